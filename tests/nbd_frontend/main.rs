//! The NBD frontend on a real executor and real sockets: with the clients people use, and with clients that mean
//! harm or fail in the middle.

mod clients;
mod harness;
mod hostile;
