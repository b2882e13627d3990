//! What to do, and nothing else: sans-IO state machines and pure decisions. No clock, socket, file or thread inside;
//! time is an argument, and what is to be done comes out as actions that `engine` (or the simulator) carries out.

pub mod copy_state;
pub mod failure_mode;
pub mod ids;
pub mod message;
pub mod record;
