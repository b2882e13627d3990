//! One TCP connection: what was received and not yet understood, what is to be sent. Never blocks.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{FromRawFd, IntoRawFd};
use std::rc::Rc;

use mio::net::TcpStream;
use rustls::pki_types::CertificateDer;

use super::buffer::Buffer;
use super::channel::Channel;

/// What is read at once when nothing larger is awaited.
const READ_MIN: usize = 64 << 10;
/// Pieces of one vectored write; the kernel takes 1,024.
const PIECES: usize = 256;
/// Bytes waiting to be sent to one peer. More than all requests of a volume with deep queues have:
/// a peer that makes it grow beyond has stopped reading.
pub const OUT_MAX: usize = 256 << 20;

/// A frame's payload, shared by every connection that sends it.
#[derive(Clone, Debug)]
pub enum Piece {
    /// Header and body of a frame, or a small frame whole.
    Head(Rc<Vec<u8>>),
    /// Raw bytes of a request.
    Raw(Rc<Buffer>),
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Head(v) => v,
            Self::Raw(b) => b,
        }
    }
}

/// A connection's buffers.
#[derive(Debug)]
pub struct Conn {
    /// The socket.
    pub stream: TcpStream,
    channel: Channel,
    input: Vec<u8>,
    /// Bytes of `input` that were understood already, and that were received.
    start: usize,
    end: usize,
    out: VecDeque<Piece>,
    /// Bytes of the first piece that were sent.
    sent: usize,
    queued: usize,
    /// The socket took less than was offered: wait until it is writable.
    blocked: bool,
}

/// A connection on its way to another thread, that has nothing to send.
pub struct Moved {
    stream: std::net::TcpStream,
    channel: Channel,
    input: Vec<u8>,
}

impl Conn {
    /// Takes over a socket; TCP_NODELAY is set, since what goes out is batched already.
    pub fn new(stream: TcpStream, channel: Channel) -> Self {
        Self {
            stream,
            channel,
            input: vec![0; READ_MIN],
            start: 0,
            end: 0,
            out: VecDeque::new(),
            sent: 0,
            queued: 0,
            blocked: false,
        }
    }

    /// Gives the connection up, with what was received and not yet taken.
    pub fn leave(self) -> Moved {
        debug_assert!(self.out.is_empty(), "what is to be sent does not move");
        let input = self.input().to_vec();
        // SAFETY: `into_raw_fd` gives up the only owner of this descriptor.
        let stream = unsafe { std::net::TcpStream::from_raw_fd(self.stream.into_raw_fd()) };
        Moved {
            stream,
            channel: self.channel,
            input,
        }
    }

    /// Certificates that the peer proved to have, its own first; `None`: it speaks no TLS.
    pub fn proof(&self) -> Option<&[CertificateDer<'static>]> {
        self.channel.proof()
    }

    /// What was received and not yet taken.
    pub fn input(&self) -> &[u8] {
        &self.input[self.start..self.end]
    }

    /// Takes `n` bytes off the input.
    pub fn take(&mut self, n: usize) {
        self.start += n;
        debug_assert!(self.start <= self.end, "only what was received is taken");
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Reads once. `need` is the length of the frame that has begun, 0 if unknown. `Ok(0)`: nothing
    /// to read now.
    ///
    /// # Errors
    ///
    /// When the connection is broken or was closed by the peer.
    pub fn read(&mut self, need: usize) -> io::Result<usize> {
        let room = need.max(READ_MIN);
        if self.input.len() - self.start < room {
            self.input.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            if self.input.len() < room {
                self.input.resize(room, 0);
            }
        }
        loop {
            let (stream, input) = (&mut self.stream, &mut self.input);
            match self.channel.read(stream, input, &mut self.end) {
                Ok(n) => return Ok(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(0),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Queues bytes to be sent.
    pub fn push(&mut self, piece: Piece) {
        self.queued += piece.bytes().len();
        self.out.push_back(piece);
    }

    /// Bytes queued.
    pub fn queued(&self) -> usize {
        self.queued
    }

    /// Whether there is something to send, of ours or of the session's.
    pub fn waits(&self) -> bool {
        !self.out.is_empty() || self.channel.holds()
    }

    /// The socket is writable again. Returns whether something waits for that.
    pub fn unblock(&mut self) -> bool {
        self.blocked = false;
        self.waits()
    }

    /// Sends what is queued, as far as the socket takes it.
    ///
    /// # Errors
    ///
    /// When the connection is broken.
    pub fn flush(&mut self) -> io::Result<()> {
        while !self.blocked && self.waits() {
            let mut slices: [IoSlice<'_>; PIECES] = std::array::from_fn(|_| IoSlice::new(&[]));
            let mut n = 0;
            for (slice, piece) in slices.iter_mut().zip(&self.out) {
                let skip = if n == 0 { self.sent } else { 0 };
                *slice = IoSlice::new(&piece.bytes()[skip..]);
                n += 1;
            }
            let wrote = match n {
                0 => self.channel.flush(&mut self.stream).map(|()| 0),
                n => self.channel.write(&mut self.stream, &slices[..n]),
            };
            let wrote = match wrote {
                Ok(wrote) => wrote,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.blocked = true;
                    return Ok(());
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            self.queued -= wrote;
            self.sent += wrote;
            while let Some(first) = self.out.front() {
                let len = first.bytes().len();
                if self.sent < len {
                    break;
                }
                self.sent -= len;
                self.out.pop_front();
            }
        }
        Ok(())
    }
}

impl Moved {
    /// The connection, in its new thread.
    pub fn arrive(self) -> Conn {
        let mut conn = Conn::new(TcpStream::from_std(self.stream), self.channel);
        conn.end = self.input.len();
        conn.input.resize(conn.end.max(READ_MIN), 0);
        conn.input[..conn.end].copy_from_slice(&self.input);
        conn
    }
}
