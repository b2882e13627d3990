//! The members of one etcd behind one connection to whichever of them answers.
//!
//! A call goes to the member that answered last. When that one fails, the connection is given up, with all watches on
//! it, and the next member's turn comes. A request that may have left is sent a second time only if it reads.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper::header::HeaderValue;
use prost::Message;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;

use super::etcd_location::{Endpoint, credentials};
use super::etcd_proto::{
    AUTHENTICATE, AuthenticateRequest, AuthenticateResponse, STATUS, StatusRequest, StatusResponse,
};
use super::etcd_rpc::{Channel, Code, Failure, late, whole};

/// How long one call takes at most, whatever fails in it: the trait promises a bound.
pub(super) const CALL: Duration = Duration::from_secs(8);
/// How long one member may take to answer. A commit takes milliseconds, on a disk in trouble a second; a member that is
/// cut off takes for ever, and a guest waits meanwhile.
pub(super) const ANSWER: Duration = Duration::from_secs(3);
/// How long a member may take until it is connected and has answered once.
const CONNECT: Duration = Duration::from_secs(2);
/// While it lasts, etcd elects a new leader and nobody can help us: a call waits that long before it gives up.
const ELECTION: Duration = Duration::from_secs(3);
/// Between two rounds over all members during that time.
const ROUND: Duration = Duration::from_millis(100);
/// After that, each member is tried less and less often: from this …
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// … to this, which is also how late a registry that is back is noticed.
const BACKOFF_MAX: Duration = Duration::from_secs(2);

const NO_LEADER: &str = "it has no leader: half of etcd's members or more are down or cut off";

/// Whether a call changes something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
}

/// Why a call gave nothing.
#[derive(Clone, Debug)]
pub(super) enum CallError {
    /// Nothing was changed; trying again may help.
    Unavailable(String),
    /// Nothing was changed; trying again does not help.
    Unusable(String),
    /// Only of a write: it may have been carried out.
    Ambiguous(String),
}

/// Why no connection could be made.
#[derive(Clone, Debug)]
pub(super) enum Trouble {
    /// It may answer later.
    Unreachable(String),
    /// It answers, and refuses us.
    Refused(String),
}

impl From<Trouble> for CallError {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Unreachable(why) => Self::Unavailable(why),
            Trouble::Refused(why) => Self::Unusable(why),
        }
    }
}

/// The members, and the connection to one of them.
pub(super) struct Members {
    endpoints: Vec<Endpoint>,
    tls: Option<TlsConnector>,
    credentials: Option<PathBuf>,
    /// What our keys begin with, for messages.
    prefix: String,
    state: Mutex<State>,
}

struct State {
    channel: Option<Arc<Channel>>,
    /// Whose turn it is.
    at: usize,
    records: Vec<Attempts>,
    /// Since when nobody answered.
    down: Option<Instant>,
}

/// What became of the attempts to reach one member.
#[derive(Default)]
struct Attempts {
    failed: u32,
    last: Option<(Trouble, Instant)>,
}

impl Attempts {
    /// Whether it is not to be tried again yet.
    fn rests(&self) -> Option<&Trouble> {
        let (trouble, at) = self.last.as_ref()?;
        let pause = BACKOFF_MIN * 2_u32.saturating_pow(self.failed.saturating_sub(1).min(16));
        (at.elapsed() < pause.min(BACKOFF_MAX)).then_some(trouble)
    }
}

impl Members {
    pub(super) fn new(
        endpoints: Vec<Endpoint>,
        tls: Option<TlsConnector>,
        credentials: Option<PathBuf>,
        prefix: String,
    ) -> Self {
        let records = endpoints.iter().map(|_| Attempts::default()).collect();
        Self {
            endpoints,
            tls,
            credentials,
            prefix,
            state: Mutex::new(State {
                channel: None,
                at: 0,
                records,
                down: None,
            }),
        }
    }

    /// The connection in use, or a new one to the first member that answers.
    pub(super) async fn channel(&self) -> Result<Arc<Channel>, Trouble> {
        let mut state = self.state.lock().await;
        loop {
            match &state.channel {
                Some(channel) if !channel.is_closed() => return Ok(channel.clone()),
                // It failed under somebody: the next member's turn.
                Some(_) => {
                    state.channel = None;
                    state.at = (state.at + 1) % self.endpoints.len();
                }
                None => {}
            }
            let trouble = match self.round(&mut state).await {
                Ok(channel) => {
                    state.down = None;
                    return Ok(channel);
                }
                Err(trouble) => trouble,
            };
            let down = *state.down.get_or_insert_with(Instant::now);
            if matches!(trouble, Trouble::Refused(_)) || down.elapsed() >= ELECTION {
                return Err(trouble);
            }
            sleep(ROUND).await;
        }
    }

    /// Tries each member once.
    async fn round(&self, state: &mut State) -> Result<Arc<Channel>, Trouble> {
        let patient = state.down.is_none_or(|since| since.elapsed() < ELECTION);
        let (mut said, mut refused) = (Vec::new(), 0);
        for turn in 0..self.endpoints.len() {
            let at = (state.at + turn) % self.endpoints.len();
            let endpoint = &self.endpoints[at];
            let trouble = match state.records[at].rests().filter(|_| !patient) {
                Some(known) => known.clone(),
                None => match self.connect(endpoint).await {
                    Ok(channel) => {
                        let channel = Arc::new(channel);
                        state.records[at] = Attempts::default();
                        state.at = at;
                        state.channel = Some(channel.clone());
                        return Ok(channel);
                    }
                    Err(trouble) => {
                        let record = &mut state.records[at];
                        record.failed = record.failed.saturating_add(1);
                        record.last = Some((trouble.clone(), Instant::now()));
                        trouble
                    }
                },
            };
            let why = match trouble {
                Trouble::Unreachable(why) => why,
                Trouble::Refused(why) => {
                    refused += 1;
                    why
                }
            };
            said.push(format!("{endpoint}: {why}"));
        }
        let said = said.join("; ");
        Err(match refused == self.endpoints.len() {
            true => Trouble::Refused(said),
            false => Trouble::Unreachable(said),
        })
    }

    /// A connection over which the member has answered: one that is stopped, or has lost the others, takes connections
    /// like any other, and a write to it would end in doubt.
    async fn connect(&self, endpoint: &Endpoint) -> Result<Channel, Trouble> {
        let attempt = async {
            let channel = self.open(endpoint).await?;
            let status = channel.call::<_, StatusResponse>(STATUS, &StatusRequest {}, CONNECT);
            match status.await {
                Ok(status) if status.leader == 0 => {
                    return Err(Trouble::Unreachable(NO_LEADER.into()));
                }
                Ok(status) => log::debug!("{endpoint} answers: etcd {}", status.version),
                Err(Failure::Refused(Code::UNAVAILABLE, why)) => {
                    let hint = if why.contains("no leader") {
                        NO_LEADER
                    } else {
                        &why
                    };
                    return Err(Trouble::Unreachable(hint.into()));
                }
                // Whoever may not tell us how it is, is alive.
                Err(Failure::Refused(..)) => {}
                Err(Failure::Unsent(why) | Failure::Lost(why)) => {
                    let hint = match (channel.is_closed(), endpoint.tls) {
                        (false, _) => "",
                        (true, false) => "; is it etcd, and does it speak http: and not https:?",
                        (true, true) => "; is it etcd?",
                    };
                    return Err(Trouble::Unreachable(why + hint));
                }
            }
            self.log_in(&channel).await?;
            Ok(channel)
        };
        timeout(CONNECT, attempt)
            .await
            .unwrap_or_else(|_| Err(Trouble::Unreachable(late(CONNECT))))
    }

    async fn open(&self, endpoint: &Endpoint) -> Result<Channel, Trouble> {
        let unreachable = |e: io::Error| Trouble::Unreachable(e.to_string());
        let stream = TcpStream::connect((endpoint.host.as_str(), endpoint.port))
            .await
            .map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        let address = endpoint.to_string();
        let channel = match &self.tls {
            None => Channel::over(stream, address).await,
            Some(connector) => {
                let name = ServerName::try_from(endpoint.host.clone())
                    .map_err(|e| Trouble::Refused(e.to_string()))?;
                let stream = connector.connect(name, stream).await.map_err(|e| {
                    let why = format!("no TLS: {}", whole(&e));
                    match e.kind() {
                        // Its certificate or ours is not accepted, or what it speaks is no TLS.
                        io::ErrorKind::InvalidData => Trouble::Refused(why),
                        io::ErrorKind::UnexpectedEof => {
                            Trouble::Unreachable(format!("{why}; does it speak http: only?"))
                        }
                        _ => Trouble::Unreachable(why),
                    }
                })?;
                Channel::over(stream, address).await
            }
        };
        channel.map_err(Trouble::Unreachable)
    }

    /// Proves who we are, if we are to be somebody.
    pub(super) async fn log_in(&self, channel: &Channel) -> Result<(), Trouble> {
        let Some(path) = &self.credentials else {
            return Ok(());
        };
        let (name, password) = credentials(path).map_err(Trouble::Refused)?;
        let question = AuthenticateRequest { name, password };
        match channel
            .call::<_, AuthenticateResponse>(AUTHENTICATE, &question, CONNECT)
            .await
        {
            Ok(answer) => {
                let mut token = HeaderValue::from_str(&answer.token)
                    .map_err(|e| Trouble::Refused(format!("a token that cannot be sent: {e}")))?;
                token.set_sensitive(true);
                channel.set_token(Some(token));
                Ok(())
            }
            // It wants to know nobody's name; that is its operator's choice.
            Err(Failure::Refused(Code::FAILED_PRECONDITION, why)) => {
                log::warn!("{} does not ask for users ({why})", channel.address);
                channel.set_token(None);
                Ok(())
            }
            Err(Failure::Refused(Code::INVALID_ARGUMENT | Code::UNAUTHENTICATED, why)) => {
                Err(Trouble::Refused(format!(
                    "user '{}' of {} is not accepted ({why})",
                    question.name,
                    path.display()
                )))
            }
            Err(Failure::Refused(_, why) | Failure::Unsent(why) | Failure::Lost(why)) => {
                Err(Trouble::Unreachable(format!("log-in: {why}")))
            }
        }
    }

    /// Asks, and asks the next member where that is harmless.
    pub(super) async fn call<Q: Message, A: Message + Default>(
        &self,
        path: &str,
        question: &Q,
        kind: Kind,
    ) -> Result<A, CallError> {
        let deadline = Instant::now() + CALL;
        let mut said = String::from("no answer");
        let mut logged_in = false;
        // Each round but those of a log-in loses a connection: once around all members is enough.
        for _ in 0..self.endpoints.len() + 2 {
            let left = deadline.saturating_duration_since(Instant::now());
            let channel = match timeout(left, self.channel()).await {
                Ok(found) => found?,
                Err(_) => break,
            };
            let patience = ANSWER.min(deadline.saturating_duration_since(Instant::now()));
            if patience.is_zero() {
                break;
            }
            let named = |why: &str| format!("{}: {why}", channel.address);
            match channel.call(path, question, patience).await {
                Ok(answer) => return Ok(answer),
                Err(Failure::Refused(code, why)) if !logged_in && self.is_of_token(code, &why) => {
                    logged_in = true;
                    match self.log_in(&channel).await {
                        Ok(()) => {}
                        Err(Trouble::Refused(why)) => {
                            return Err(CallError::Unusable(named(&why)));
                        }
                        Err(Trouble::Unreachable(why)) => {
                            said = named(&why);
                            channel.close();
                        }
                    }
                }
                Err(Failure::Refused(code, why)) if is_final(code) => {
                    return Err(CallError::Unusable(named(&self.advice(code, &why))));
                }
                Err(Failure::Unsent(why)) => {
                    said = named(&why);
                    channel.close();
                }
                Err(failure) => {
                    said = named(&match failure {
                        Failure::Refused(code, why) => self.advice(code, &why),
                        Failure::Lost(why) | Failure::Unsent(why) => why,
                    });
                    channel.close();
                    if kind == Kind::Write {
                        return Err(CallError::Ambiguous(said));
                    }
                }
            }
        }
        Err(CallError::Unavailable(said))
    }

    /// Whether the refusal means no more than that our token is old, or that we have none yet and could.
    fn is_of_token(&self, code: Code, why: &str) -> bool {
        let old = ["auth token", "revision of auth store", "user name is empty"];
        self.credentials.is_some()
            && (code == Code::UNAUTHENTICATED
                || code == Code::INVALID_ARGUMENT && old.iter().any(|o| why.contains(o)))
    }

    /// What etcd said, and what to do about it.
    fn advice(&self, code: Code, why: &str) -> String {
        match code {
            // Our certificate's name was taken for the user.
            Code::PERMISSION_DENIED if self.credentials.is_none() => format!(
                "{why}; give --etcd-credentials FILE, or the user of our certificate's name a role: etcdctl role \
                 grant-permission ROLE --prefix=true readwrite {}",
                self.prefix
            ),
            Code::PERMISSION_DENIED => format!(
                "{why}; grant our user's role: etcdctl role grant-permission ROLE --prefix=true readwrite {}",
                self.prefix
            ),
            Code::INVALID_ARGUMENT | Code::UNAUTHENTICATED
                if self.credentials.is_none() && why.contains("user name is empty") =>
            {
                format!("{why}; it asks for a user: give --etcd-credentials FILE")
            }
            Code::RESOURCE_EXHAUSTED if why.contains("space") => format!(
                "{why}; etcd is full: compact and defragment it, or raise its quota, then run etcdctl alarm disarm"
            ),
            _ => why.into(),
        }
    }
}

/// Codes that etcd gives before it carries anything out. All others may come after it: "request timed out" (14) from a
/// member whose proposal is still on its way, and "database space exceeded" (8), which etcd also says of a write that it
/// has just applied (its issue 16659).
fn is_final(code: Code) -> bool {
    matches!(
        code,
        Code::INVALID_ARGUMENT
            | Code::NOT_FOUND
            | Code::PERMISSION_DENIED
            | Code::FAILED_PRECONDITION
            | Code::OUT_OF_RANGE
            | Code::UNIMPLEMENTED
            | Code::UNAUTHENTICATED
    )
}
