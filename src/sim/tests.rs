//! Simulations of the engine.

mod random;
