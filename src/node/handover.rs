//! What one program leaves for the next: a file in memory that says which descriptors are what.
//!
//! It is read by another version of this program, so its format has a number, and a program says before anything is stopped
//! which numbers it reads (`--can-take-over`). Connections are in it as vhost-user messages (`guest::handover`): what a front-end
//! and a back-end say to each other changes slower than we do.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};

use crate::cluster::config::NodeConfig;
use crate::cluster::join::Doors;
use crate::engine::{exec, now};
use crate::guest::{Handed, Message, Packed, Tally};
use crate::replication::ids::VolumeId;

/// The format that this program writes, and the only one it reads.
pub(super) const FORMAT: u32 = 1;
/// Names the process and the descriptor of the file to the program that begins.
pub(super) const VARIABLE: &str = "LOCKSTEP_HANDOVER";

/// What [`VARIABLE`] is set to.
pub(super) fn variable(file: &File) -> String {
    format!("{}:{}", std::process::id(), file.as_raw_fd())
}

/// Whether this program could go on where one ends that writes `format`.
pub(super) fn reads(format: u32) -> Result<(), String> {
    if format == FORMAT {
        return Ok(());
    }
    Err(format!(
        "the running program hands over in format {format}, and this one ({}) reads format {FORMAT} only: \
         restart the node instead (SIGTERM, then start)",
        env!("CARGO_PKG_VERSION")
    ))
}

/// The content of the file.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    format: u32,
    /// Of the program that ends.
    version: String,
    /// When the first ring stood still: CLOCK_BOOTTIME, nanoseconds.
    stood_still: u64,
    replication: Door,
    http: Door,
    api: Door,
    volumes: Vec<Served>,
}

/// Just enough of it to tell its format.
#[derive(Deserialize)]
struct AnyFormat {
    format: u32,
}

/// A listening socket, and what the configuration called it.
#[derive(Debug, Serialize, Deserialize)]
struct Door {
    address: String,
    fd: RawFd,
}

#[derive(Debug, Serialize, Deserialize)]
struct Served {
    volume: VolumeId,
    socket: PathBuf,
    listener: RawFd,
    inode: RawFd,
    session: Option<Session>,
    /// Its connection was closed, so that it could stand still.
    #[serde(default)]
    lost: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Session {
    stream: RawFd,
    messages: Vec<Said>,
}

/// A vhost-user message.
#[derive(Debug, Serialize, Deserialize)]
struct Said {
    request: u32,
    body: Vec<u8>,
    fds: Vec<RawFd>,
}

/// What the sockets of a node are called in its configuration.
pub(super) struct Names {
    replication: String,
    http: String,
    api: String,
}

impl Names {
    pub(super) fn of(config: &NodeConfig) -> Names {
        Names {
            replication: config.listen.to_string(),
            http: config.http.to_string(),
            // As the running one calls it, whose working directory may be another.
            api: std::path::absolute(config.api_socket())
                .unwrap_or_else(|_| config.api_socket())
                .display()
                .to_string(),
        }
    }
}

/// A volume that stands still.
pub(super) struct Standing {
    pub(super) volume: VolumeId,
    pub(super) socket: PathBuf,
    pub(super) handed: Handed,
    /// It had a connection, which was closed.
    pub(super) lost: bool,
}

/// Writes the file, and sees to it that all it names, and itself, outlives the change of the program; nothing else does.
///
/// # Errors
///
/// The system's.
pub(super) fn leave(
    names: &Names,
    doors: &Doors,
    stood_still: u64,
    volumes: &[Standing],
) -> io::Result<File> {
    exec::keep_nothing()?;
    let mut kept = Vec::new();
    let mut keep = |fd: &OwnedFd| {
        kept.push(exec::keep(fd.as_fd()));
        fd.as_raw_fd()
    };
    let serve = |standing: &Standing| {
        let handed = &standing.handed;
        Served {
            volume: standing.volume,
            socket: standing.socket.clone(),
            listener: keep(&handed.listener),
            inode: keep(&handed.inode),
            session: handed.session.as_ref().map(|packed| Session {
                stream: keep(&packed.stream),
                messages: packed
                    .messages
                    .iter()
                    .map(|message| Said {
                        request: message.request,
                        body: message.body.clone(),
                        fds: message.fds.iter().map(&mut keep).collect(),
                    })
                    .collect(),
            }),
            lost: standing.lost,
        }
    };
    let volumes = volumes.iter().map(serve).collect();
    let mut door = |address: &str, fd: Option<&dyn AsFd>| {
        let fd = fd.ok_or(io::ErrorKind::NotFound)?.as_fd();
        kept.push(exec::keep(fd));
        Ok::<_, io::Error>(Door {
            address: address.into(),
            fd: fd.as_raw_fd(),
        })
    };
    let state = State {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION").into(),
        stood_still,
        replication: door(
            &names.replication,
            doors.replication.as_ref().map(|d| d as _),
        )?,
        http: door(&names.http, doors.http.as_ref().map(|d| d as _))?,
        api: door(&names.api, doors.api.as_ref().map(|d| d as _))?,
        volumes,
    };
    kept.into_iter().collect::<io::Result<()>>()?;
    let mut file: File = rustix::fs::memfd_create("lockstep-handover", MemfdFlags::CLOEXEC)?.into();
    file.write_all(&serde_json::to_vec(&state)?)?;
    file.seek(SeekFrom::Start(0))?;
    exec::keep(file.as_fd())?;
    Ok(file)
}

/// What the program before left for this one.
pub(super) struct Inherited {
    /// Its version.
    pub(super) version: String,
    /// When the first ring stood still.
    pub(super) stood_still: Instant,
    /// Its listening sockets, each with what its configuration called it.
    doors: Vec<(String, OwnedFd)>,
    /// What it served.
    pub(super) volumes: HashMap<VolumeId, (PathBuf, Handed)>,
    /// Follows its connections.
    pub(super) tally: Tally,
}

impl Inherited {
    /// Takes up what a program left that this one took the place of. To be called before anything else is opened: what was
    /// left and is not understood is closed, so that front-ends connect again.
    pub(super) fn take() -> Option<Inherited> {
        let variable = std::env::var(VARIABLE).ok()?;
        let (pid, fd) = variable.split_once(':')?;
        if pid != std::process::id().to_string() {
            // Of a program that has begun with our environment, by whatever way.
            return None;
        }
        match Inherited::read(fd) {
            Ok(inherited) => Some(inherited),
            Err(why) => {
                log::error!(
                    "what the program before left cannot be taken over: {why}; front-ends connect again"
                );
                if let Err(e) = exec::close_all() {
                    log::error!("what it left cannot be closed: {e}");
                }
                None
            }
        }
    }

    fn read(fd: &str) -> Result<Inherited, String> {
        let number = fd.parse().map_err(|e| format!("{VARIABLE}: {e}"))?;
        let text = |e: io::Error| e.to_string();
        let mut file = File::from(exec::adopt(number).map_err(text)?);
        let mut json = Vec::new();
        file.read_to_end(&mut json).map_err(text)?;
        // Format first: the other fields of a newer one may be anything.
        let AnyFormat { format } = serde_json::from_slice(&json).map_err(|e| e.to_string())?;
        reads(format)?;
        let state: State = serde_json::from_slice(&json).map_err(|e| e.to_string())?;
        Inherited::adopt(state).map_err(text)
    }

    fn adopt(state: State) -> io::Result<Inherited> {
        let tally = Tally::default();
        let mut volumes = HashMap::new();
        for served in state.volumes {
            if served.lost {
                drop(tally.receipt());
            }
            let session = match served.session {
                None => None,
                Some(Session { stream, messages }) => Some(Packed {
                    stream: exec::adopt(stream)?,
                    messages: messages.into_iter().map(hear).collect::<io::Result<_>>()?,
                    receipt: tally.receipt(),
                }),
            };
            let handed = Handed {
                listener: exec::adopt(served.listener)?,
                inode: exec::adopt(served.inode)?,
                session,
            };
            volumes.insert(served.volume, (served.socket, handed));
        }
        let door = |door: Door| Ok::<_, io::Error>((door.address, exec::adopt(door.fd)?));
        let ago = now().0.saturating_sub(state.stood_still);
        Ok(Inherited {
            version: state.version,
            stood_still: Instant::now()
                .checked_sub(Duration::from_nanos(ago))
                .unwrap_or_else(Instant::now),
            doors: vec![
                door(state.replication)?,
                door(state.http)?,
                door(state.api)?,
            ],
            volumes,
            tally,
        })
    }

    /// The listening sockets that are still what the configuration wants; the others are closed.
    pub(super) fn take_doors(&mut self, names: &Names) -> Doors {
        let mut take = |wanted: &String| {
            let at = self.doors.iter().position(|(name, _)| name == wanted)?;
            Some(self.doors.swap_remove(at).1)
        };
        let doors = Doors {
            replication: take(&names.replication).map(TcpListener::from),
            http: take(&names.http).map(TcpListener::from),
            api: take(&names.api).map(UnixListener::from),
        };
        self.doors.clear();
        doors
    }
}

fn hear(said: Said) -> io::Result<Message> {
    Ok(Message {
        request: said.request,
        body: said.body,
        fds: said
            .fds
            .into_iter()
            .map(exec::adopt)
            .collect::<io::Result<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a program of format 1 leaves. Not to be changed: another program reads it, of another version.
    const WRITTEN: &str = concat!(
        r#"{"format":1,"version":"0.1.0","stood_still":5,"replication":{"address":"127.0.0.1:5703","fd":3},"#,
        r#""http":{"address":"127.0.0.1:5705","fd":4},"api":{"address":"/run/api.sock","fd":5},"#,
        r#""volumes":[{"volume":"30313233-3435-3637-3839-616263646566","socket":"/run/v.sock","listener":6,"inode":7,"#,
        r#""session":{"stream":8,"messages":[{"request":12,"body":[0,0,0,0,0,0,0,0],"fds":[9]}]},"lost":false}]}"#
    );

    fn state() -> State {
        let door = |address: &str, fd| Door {
            address: address.into(),
            fd,
        };
        State {
            format: FORMAT,
            version: "0.1.0".into(),
            stood_still: 5,
            replication: door("127.0.0.1:5703", 3),
            http: door("127.0.0.1:5705", 4),
            api: door("/run/api.sock", 5),
            volumes: vec![Served {
                volume: VolumeId(*b"0123456789abcdef"),
                socket: "/run/v.sock".into(),
                listener: 6,
                inode: 7,
                session: Some(Session {
                    stream: 8,
                    messages: vec![Said {
                        request: 12,
                        body: vec![0; 8],
                        fds: vec![9],
                    }],
                }),
                lost: false,
            }],
        }
    }

    #[test]
    fn the_file_is_written_and_read_as_format_1_always_was() {
        assert_eq!(serde_json::to_string(&state()).unwrap(), WRITTEN);
        // The first programs of this format said nothing of lost connections; a later one may say more than we know.
        let first = WRITTEN.replace(r#","lost":false"#, "");
        let later = WRITTEN.replace(r#""format":1"#, r#""format":1,"more":[1]"#);
        assert!(first != WRITTEN && later != WRITTEN);
        for text in [first, later] {
            let read: State = serde_json::from_str(&text).unwrap();
            assert_eq!(serde_json::to_string(&read).unwrap(), WRITTEN);
        }
    }

    #[test]
    fn a_format_is_told_before_anything_else_is_read() {
        let AnyFormat { format } = serde_json::from_str(r#"{"volumes":"?","format":2}"#).unwrap();
        assert!(reads(format).unwrap_err().contains("format 2"));
    }

    #[test]
    fn the_variable_names_the_process_and_the_file() {
        let file = File::open("/dev/null").unwrap();
        let (pid, fd) = (std::process::id(), file.as_raw_fd());
        assert_eq!(variable(&file), format!("{pid}:{fd}"));
    }
}
