//! A connection handed to the program that takes this one's place, without the front-end noticing.
//!
//! A process that replaces its program keeps its descriptors. What else there is to a connection is written down in words
//! that need no version of ours: as the vhost-user messages by which a front-end would bring a fresh back-end to the same
//! point. The successor reads them from a socket of its own, through the message layer and the handlers that every front-end
//! goes through, and then goes on with the front-end's socket, in which whatever was sent meanwhile waits.
//!
//! The rings stand still from [`DataPlane::park`](super::DataPlane::park) on. What is in flight then is in the in-flight
//! region, and submitted again by the successor exactly as after the death of a process (`inflight`). A front-end without
//! such a region is handed over only when nothing is in flight.

use std::fmt;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use vhost::vhost_user::message::FrontendReq;
use vm_memory::ByteValued;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// The version in a vhost-user header's flags.
const VERSION: u32 = 1;
/// Answers are read in pieces of so many bytes.
const ANSWER_MAX: usize = 4096;

/// One vhost-user message, as a front-end sends it.
#[derive(Debug)]
pub struct Message {
    /// Its number in the specification.
    pub request: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// What travels with it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    pub(super) fn new(request: FrontendReq, body: &impl ByteValued) -> Message {
        Message {
            request: request as u32,
            body: body.as_slice().to_vec(),
            fds: Vec::new(),
        }
    }

    /// One that only asks.
    pub(super) fn bare(request: FrontendReq) -> Message {
        Message {
            request: request as u32,
            body: Vec::new(),
            fds: Vec::new(),
        }
    }

    pub(super) fn with(mut self, fd: OwnedFd) -> Message {
        self.fds.push(fd);
        self
    }

    pub(super) fn send(&self, socket: &UnixStream) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(12 + self.body.len());
        for word in [self.request, VERSION, self.body.len() as u32] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(&self.body);
        let fds: Vec<_> = self.fds.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = socket.send_with_fds(&[&bytes[..]], &fds)?;
        // A message is far smaller than a socket's buffer, which is empty.
        if sent == bytes.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }
}

/// A connection that stands still.
#[derive(Debug)]
pub struct Packed {
    /// The front-end's socket.
    pub stream: OwnedFd,
    /// What brings a fresh back-end to where this one is.
    pub messages: Vec<Message>,
    /// Says how it went, where it is unpacked.
    pub receipt: Receipt,
}

/// What a server has to hand over.
#[derive(Debug)]
pub struct Handed {
    /// Takes connections; those that nobody answered yet wait in it.
    pub listener: OwnedFd,
    /// The socket's inode, as a mere path.
    pub inode: OwnedFd,
    /// The connection, if a front-end is connected.
    pub session: Option<Packed>,
}

/// How many connections were taken over, for whoever waits for it. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Tally(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    open: AtomicUsize,
    taken: AtomicUsize,
    lost: AtomicUsize,
    last: Mutex<Option<Instant>>,
}

impl Tally {
    /// For one more connection.
    pub fn receipt(&self) -> Receipt {
        self.0.open.fetch_add(1, Ordering::SeqCst);
        Receipt {
            counts: Some(Arc::clone(&self.0)),
            taken: false,
        }
    }

    /// Connections whose fate is not known yet.
    pub fn open(&self) -> usize {
        self.0.open.load(Ordering::SeqCst)
    }

    /// Connections that go on here.
    pub fn taken(&self) -> usize {
        self.0.taken.load(Ordering::SeqCst)
    }

    /// Connections that were closed instead.
    pub fn lost(&self) -> usize {
        self.0.lost.load(Ordering::SeqCst)
    }

    /// When the last of them was taken over or lost.
    pub fn last(&self) -> Option<Instant> {
        *self.0.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is to be said about one connection. Dropped without a word, the connection was lost.
#[derive(Debug, Default)]
pub struct Receipt {
    counts: Option<Arc<Counts>>,
    taken: bool,
}

impl Receipt {
    /// Nobody wants to know: on the side that hands over.
    pub fn none() -> Receipt {
        Receipt::default()
    }

    pub(super) fn taken(mut self) {
        self.taken = true;
    }
}

impl Drop for Receipt {
    fn drop(&mut self) {
        let Some(counts) = &self.counts else { return };
        let count = if self.taken {
            &counts.taken
        } else {
            &counts.lost
        };
        count.fetch_add(1, Ordering::SeqCst);
        let now = Some(Instant::now());
        *counts.last.lock().unwrap_or_else(PoisonError::into_inner) = now;
        // Last: whoever sees it at zero finds the others right.
        counts.open.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Has a message layer take in the messages of a packed connection: `step` reads one from the other end of `ours`, which does
/// not block.
///
/// # Errors
///
/// The socket's, and those of `step`, with the number of the message.
pub(super) fn replay<E: fmt::Display>(
    mut ours: UnixStream,
    messages: Vec<Message>,
    mut step: impl FnMut() -> Result<(), E>,
) -> Result<(), String> {
    let mut answers = [0; ANSWER_MAX];
    for message in messages {
        let request = message.request;
        let failed = |why: String| format!("message {request}: {why}");
        message.send(&ours).map_err(|e| failed(e.to_string()))?;
        // What the layer received are its own; a ring's must not be open twice.
        drop(message);
        step().map_err(|e| failed(e.to_string()))?;
        // The front-end had its answers from the process before.
        while ours.read(&mut answers).is_ok_and(|n| n > 0) {}
    }
    Ok(())
}

/// Makes the descriptor `to` mean what `from` does, in one step.
///
/// # Errors
///
/// The system's.
pub(super) fn replace(to: BorrowedFd<'_>, from: BorrowedFd<'_>) -> io::Result<()> {
    let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
    // SAFETY: both are open, and the owner of `to` owns what it means from now on.
    match unsafe { libc::dup3(from, to, libc::O_CLOEXEC) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
