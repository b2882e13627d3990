//! HTTP: the management API on the node's socket, and what may be read on its TCP port.

pub mod client;
