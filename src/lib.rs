//! lockstep: disks for virtual machines that survive the loss of a node.

pub mod api;
pub mod cli;
pub mod cluster;
pub mod copy;
pub mod engine;
pub mod guest;
pub mod node;
pub mod registry;
pub mod replication;
pub mod wire;
