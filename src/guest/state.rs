//! The device's state, for front-ends that save it with the virtual machine (DEVICE_STATE: cloud-hypervisor's snapshots).
//!
//! There is none: what a disk is lies on its volume, where a ring goes on is GET_VRING_BASE's to say, and the front-end knows
//! the rest. So what is saved is empty, and what is restored must be: anything else is the state of another device.

use std::fs::File;
use std::io;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// How long a front-end may take to end a state that it has sent. It has when it asks whether that went well; QEMU and
/// cloud-hypervisor hold their machine still meanwhile.
const PATIENCE_MS: libc::c_int = 1000;

/// A state that a front-end is sending.
#[derive(Debug)]
pub(super) struct Incoming(File);

impl Incoming {
    pub(super) fn new(channel: File) -> Incoming {
        Incoming(channel)
    }

    /// Where it comes from, once more: whoever takes the connection over waits for the rest.
    ///
    /// # Errors
    ///
    /// The process has no descriptors left.
    pub(super) fn describe(&self) -> io::Result<OwnedFd> {
        self.0.as_fd().try_clone_to_owned()
    }

    /// Whether it was sent, and is ours.
    ///
    /// # Errors
    ///
    /// A sentence for the log.
    pub(super) fn check(mut self) -> Result<(), String> {
        let mut poll = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid entry, and its descriptor is open.
        if unsafe { libc::poll(&raw mut poll, 1, PATIENCE_MS) } != 1 {
            return Err("the front-end does not end the device state that it sends".into());
        }
        // The front-end may have read it itself meanwhile, and whoever detaches the volume waits for this thread.
        // SAFETY: takes no pointers, and the descriptor is open.
        unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        match self.0.read(&mut [0; 1]) {
            Ok(0) => Ok(()),
            Ok(_) => Err("the device state is of another device: a volume has none".into()),
            Err(e) => Err(format!("the device state cannot be read: {e}")),
        }
    }
}
