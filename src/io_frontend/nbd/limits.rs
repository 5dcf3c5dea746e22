//! What one connection may ask for. Every limit has a name, a default and a stated consequence.

use super::proto::PAYLOAD_DEFAULT_MAX;
use std::time::Duration;

/// Limits of one connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Options in one handshake; a client that sends more is dropped.
    pub options_max: u32,
    /// Data of one option, in bytes; a client that sends more is dropped.
    pub option_data_bytes_max: u32,
    /// From the accepted connection to the end of the handshake; a slower client is dropped.
    pub handshake_time_max: Duration,
    /// Requests that are read from the socket and whose reply is not yet sent. No more are read until one is: this
    /// also bounds the queue of replies, so a client that reads no replies is no longer read from.
    pub requests_in_flight_max: u64,
    /// Payload of those requests, in bytes, both directions together. At least `payload_bytes_max`.
    pub payload_bytes_in_flight_max: u64,
    /// What a connection has of those for itself, in bytes. The rest is from the memory that connections share: requests
    /// that don't fit wait for their turn.
    pub payload_bytes_own: u64,
    /// Payload of one READ or WRITE, in bytes; a longer one is refused. Advertised to clients.
    pub payload_bytes_max: u32,
    /// The payload of a refused WRITE is read and thrown away up to this length, in bytes; a client that announces
    /// more is dropped, since its stream can't be followed at a reasonable price.
    pub discard_bytes_max: u32,
    /// How long a client that holds shared memory may take nothing of its replies (or less than 256 KiB of them), or send
    /// nothing of a payload (the same), while others wait for memory; a slower one is dropped, those that stall longest
    /// first. It may take as long as it likes while nobody waits.
    pub stall_time_max: Duration,
    /// After a stop: how long replies to requests in flight may take until the socket is closed anyway. (The
    /// requests themselves are waited for as long as they take.)
    pub drain_time_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            options_max: 64,
            option_data_bytes_max: 64 << 10,
            handshake_time_max: Duration::from_secs(10),
            requests_in_flight_max: 128,
            payload_bytes_in_flight_max: 64 << 20,
            payload_bytes_own: 256 << 10,
            payload_bytes_max: PAYLOAD_DEFAULT_MAX,
            discard_bytes_max: 64 << 20,
            stall_time_max: Duration::from_secs(2),
            drain_time_max: Duration::from_secs(5),
        }
    }
}
