//! lockstep: disks for virtual machines that survive the loss of a node.

pub mod copy;
pub mod guest;
pub mod replication;
pub mod wire;
