//! What lies between a connection's buffers and its socket: nothing, or a TLS session.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::sync::Arc;

use mio::net::TcpStream;
use rustls::pki_types::CertificateDer;
use rustls::{ClientConnection, Connection, ServerConfig, ServerConnection};

use crate::wire::tls::{ENDED, FIRST_BYTE};

/// Encrypted bytes that are read at once. The session itself would read 4 KiB at a time.
const SEALED: usize = 64 << 10;
/// Bytes that a session holds, encrypted, while the socket does not take them.
const HELD: usize = 256 << 10;

/// How the bytes of one connection get to its socket.
#[derive(Debug)]
pub enum Channel {
    /// As they are.
    Plain,
    /// Accepted by a node that speaks TLS; what the peer speaks, its first byte will tell.
    Accepted(Arc<ServerConfig>),
    /// Through a session.
    Tls(Box<Session>),
}

/// One end of a TLS connection.
#[derive(Debug)]
pub struct Session {
    tls: Connection,
    sealed: Box<[u8]>,
}

impl Session {
    fn new(mut tls: Connection) -> Box<Self> {
        tls.set_buffer_limit(Some(HELD));
        Box::new(Self {
            tls,
            sealed: vec![0; SEALED].into(),
        })
    }

    /// One read of the socket, opened behind `input[..*end]`.
    fn read(
        &mut self,
        stream: &mut TcpStream,
        input: &mut Vec<u8>,
        end: &mut usize,
    ) -> io::Result<usize> {
        let before = *end;
        loop {
            let received = match stream.read(&mut self.sealed)? {
                0 => return Err(self.closed()),
                n => n,
            };
            let mut sealed = &self.sealed[..received];
            while !sealed.is_empty() {
                if self.tls.read_tls(&mut sealed)? == 0 {
                    // Nothing counts after the peer's farewell.
                    return Err(self.closed());
                }
                let state = self.tls.process_new_packets().map_err(|e| {
                    // The peer is told why, if the socket takes it.
                    let _ = self.tls.write_tls(stream);
                    io::Error::new(ErrorKind::InvalidData, format!("no TLS: {e}"))
                })?;
                let plain = state.plaintext_bytes_to_read();
                if input.len() < *end + plain {
                    input.resize(*end + plain, 0);
                }
                self.tls
                    .reader()
                    .read_exact(&mut input[*end..*end + plain])?;
                *end += plain;
            }
            // Otherwise what came was of the handshake, or a part of a record.
            if *end > before {
                return Ok(*end - before);
            }
        }
    }

    fn closed(&self) -> io::Error {
        let why = match self.tls.is_handshaking() {
            true => ENDED,
            false => CLOSED,
        };
        io::Error::new(ErrorKind::UnexpectedEof, why)
    }
}

const CLOSED: &str = "closed by the peer";

impl Channel {
    /// For a connection that was accepted.
    pub fn accepted(config: Option<Arc<ServerConfig>>) -> Self {
        config.map_or(Self::Plain, Self::Accepted)
    }

    /// For one that is being made.
    pub fn dialed(session: Option<ClientConnection>) -> Self {
        session.map_or(Self::Plain, |tls| Self::Tls(Session::new(tls.into())))
    }

    /// Certificates that the peer proved to have, its own first; `None`: no TLS, or not yet.
    pub fn proof(&self) -> Option<&[CertificateDer<'static>]> {
        match self {
            Self::Tls(session) => session.tls.peer_certificates(),
            Self::Plain | Self::Accepted(_) => None,
        }
    }

    /// Whether it holds bytes, of the connection or its own, that the socket is to take.
    pub fn holds(&self) -> bool {
        matches!(self, Self::Tls(session) if session.tls.wants_write())
    }

    /// Reads behind `input[..*end]`, which grows if that is not enough, and moves `*end`.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when nothing is there; any other ends the connection.
    pub fn read(
        &mut self,
        stream: &mut TcpStream,
        input: &mut Vec<u8>,
        end: &mut usize,
    ) -> io::Result<usize> {
        if let Self::Accepted(config) = self {
            let mut first = [0];
            if stream.peek(&mut first)? == 1 && first[0] == FIRST_BYTE {
                let tls = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
                *self = Self::Tls(Session::new(tls.into()));
            } else {
                *self = Self::Plain;
            }
        }
        match self {
            Self::Tls(session) => session.read(stream, input, end),
            Self::Plain | Self::Accepted(_) => match stream.read(&mut input[*end..])? {
                0 => Err(io::Error::new(ErrorKind::UnexpectedEof, CLOSED)),
                n => {
                    *end += n;
                    Ok(n)
                }
            },
        }
    }

    /// Writes some of `slices`; how many of their bytes are taken.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when the socket takes nothing; any other ends the connection.
    pub fn write(&mut self, stream: &mut TcpStream, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let Self::Tls(session) = self else {
            return stream.write_vectored(slices);
        };
        loop {
            match session.tls.writer().write_vectored(slices)? {
                0 if session.tls.wants_write() => session.tls.write_tls(stream)?,
                // The handshake has not ended, and more is waiting for it than anybody says before.
                0 => return Err(ErrorKind::WouldBlock.into()),
                taken => return Ok(taken),
            };
        }
    }

    /// Sends what it holds.
    ///
    /// # Errors
    ///
    /// As [`Self::write`].
    pub fn flush(&mut self, stream: &mut TcpStream) -> io::Result<()> {
        if let Self::Tls(session) = self {
            while session.tls.wants_write() {
                session.tls.write_tls(stream)?;
            }
        }
        Ok(())
    }
}
