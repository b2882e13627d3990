//! What to do, and nothing else: sans-IO state machines and pure decisions. No clock, socket, file or thread inside;
//! time is an argument, and what is to be done comes out as actions that `engine` (or the simulator) carries out.

pub mod activity_log;
pub mod attachment;
pub mod copy_set;
pub mod copy_state;
pub mod dirty_map;
pub mod failure_mode;
pub mod fence;
pub mod growth;
pub mod ids;
pub mod in_flight;
pub mod membership;
pub mod message;
pub mod mutants;
pub mod record;
pub mod registry_answer;
pub mod replica;
pub mod resync;
pub mod scrub;
pub mod takeover;
pub mod throttle;
pub mod timing;
