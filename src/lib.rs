//! lockstep: disks for virtual machines that survive the loss of a node.
//!
//! One process a node. It serves virtqueues straight from guest memory over vhost-user-blk and has every in-sync copy
//! of a volume apply a write before the guest sees it complete.
//!
//! The house, from the outside in; a line of code lives in the room whose question it answers:
//!
//! - [`cli`]: what a person types; [`api`]: the same over HTTP;
//! - [`node`]: builds the rooms and joins them;
//! - [`cluster`]: which volumes there should be and where, and the loop that makes it so; [`registry`]: where that
//!   is written down, changed by compare-and-swap only;
//! - [`guest`]: what the virtual machine sees;
//! - [`engine`]: how it is done: one loop a worker owns rings, connections and disk queue;
//! - [`replication`]: what to do, and nothing else: state machines without clock, socket, file or thread;
//! - [`wire`]: bytes between nodes; [`copy`]: bytes on a disk. Neither knows the other.
//!
//! The life of one write: the guest kicks; `guest::ring` takes the chain and `guest::request` checks it;
//! `engine::rings` copies the guest's bytes once and submits them; `replication::attachment` orders the write behind
//! overlapping ones and sends it to every in-sync copy; `engine::context` compresses it once and queues one frame on
//! each connection, while the copy of this node gets it by hand; on every node `replication::replica` checks the epoch
//! and has the region made durable in the activity log before `engine::disk` writes the data; the answers come back in
//! one frame a turn; when the last in-sync copy has answered and the failure mode agrees, `engine::rings` writes the
//! status, and the guest is notified once for everything that the turn completed. docs/ARCHITECTURE.md has the long
//! version, docs/PROTOCOL.md the reasons.

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
