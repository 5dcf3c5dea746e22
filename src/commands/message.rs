//! `hydrant message`: one of dm-clone's messages to a running clone.

use super::daemons::client_of;
use crate::cli::MessageArgs;
use crate::control::api::Message;
use crate::error::Result;

/// Returns when the message is in force.
pub fn run(args: &MessageArgs) -> Result<()> {
    let words: Vec<&str> = args.message.iter().flat_map(|word| word.split_ascii_whitespace()).collect();
    let message = Message::from_words(&words)?;
    client_of(&args.name, &args.control).message(&args.name, &message)
}
