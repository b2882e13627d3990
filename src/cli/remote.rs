//! The node at the other end of a command.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::client::{Answer, ClientError, Target, ask, ask_lines, runtime};
use crate::cluster::fault::Fault;

/// How long a command waits for its answer. Longer than anything the node itself waits for, a forced removal's detach
/// included: its answer says more than our giving up would.
const PATIENCE: Duration = Duration::from_secs(180);
/// How often a waiting command says so on a terminal.
const STEP: Duration = Duration::from_secs(1);
/// And in a log, where each time is a line.
pub(super) const STEP_OF_LINES: Duration = Duration::from_secs(10);
/// Back to the line's beginning, and nothing on it (ECMA-48 EL).
pub(super) const CLEAR_LINE: &str = "\r\x1b[K";

/// See the module.
pub(super) struct Remote<'a> {
    target: &'a Target,
}

impl<'a> Remote<'a> {
    pub(super) fn new(target: &'a Target) -> Self {
        Self { target }
    }

    /// Reads.
    pub(super) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Fault> {
        self.request(Method::GET, path, None)
    }

    /// Changes something.
    pub(super) fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Fault> {
        let body = serde_json::to_vec(body)
            .map_err(|e| Fault::internal(format!("the request cannot be written: {e}")))?;
        self.request(method, path, Some(body))
    }

    /// The same of a node that may be gone before its answer is read: `None` if the conversation broke off.
    pub(super) fn send_off<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
    ) -> Result<Option<T>, Fault> {
        let runtime = runtime().map_err(no_runtime)?;
        let asked = ask(self.target, method, path, None, Some(PATIENCE));
        match runtime.block_on(with_progress(asked)) {
            Ok(answer) => self.understood(answer).map(Some),
            Err(ClientError::Broken(_)) => Ok(None),
            Err(e) => Err(self.unreachable(&e)),
        }
    }

    fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<T, Fault> {
        let runtime = runtime().map_err(no_runtime)?;
        let answer = runtime
            .block_on(with_progress(ask(
                self.target,
                method,
                path,
                body,
                Some(PATIENCE),
            )))
            .map_err(|e| self.unreachable(&e))?;
        self.understood(answer)
    }

    fn understood<T: DeserializeOwned>(&self, answer: Answer) -> Result<T, Fault> {
        let body = self.success(answer)?;
        serde_json::from_slice(&body).map_err(|e| {
            Fault::internal(format!(
                "the answer of {} is not understood: {e}",
                self.target
            ))
        })
    }

    /// Hands every line of a stream to `take` until it says `false`.
    pub(super) fn lines(&self, path: &str, take: impl FnMut(&str) -> bool) -> Result<(), Fault> {
        let runtime = runtime().map_err(no_runtime)?;
        let answer = runtime
            .block_on(ask_lines(self.target, path, take))
            .map_err(|e| self.unreachable(&e))?;
        self.success(answer).map(drop)
    }

    fn success(&self, answer: Answer) -> Result<Vec<u8>, Fault> {
        if answer.status.is_success() {
            return Ok(answer.body.to_vec());
        }
        Err(serde_json::from_slice(&answer.body).unwrap_or_else(|_| {
            Fault::internal(format!("{} answered {}", self.target, answer.status))
        }))
    }

    fn unreachable(&self, error: &ClientError) -> Fault {
        let fault = Fault::try_again(format!("no node answers at {}: {error}", self.target));
        let kind = match error {
            ClientError::Connect(e) => Some(e.kind()),
            ClientError::Broken(_) | ClientError::Late(_) => None,
        };
        match kind {
            Some(io::ErrorKind::PermissionDenied) => fault.hint(
                "the socket is for its owner and group: become a member, or use sudo",
            ),
            Some(_) => fault.hint(
                "start one: lockstep node --name n1; or name its socket: --host unix:RUN-DIR/api.sock \
                 (or LOCKSTEP_HOST)",
            ),
            None => fault.hint("look at the node's log"),
        }
    }
}

/// Says now and then that an answer is still waited for: in place on a terminal, as plain lines elsewhere.
async fn with_progress<T>(work: impl Future<Output = T>) -> T {
    let terminal = io::stderr().is_terminal();
    let step = if terminal { STEP } else { STEP_OF_LINES };
    let begun = Instant::now();
    let mut shown = false;
    let mut work = std::pin::pin!(work);
    loop {
        match tokio::time::timeout(step, &mut work).await {
            Ok(result) => {
                if shown && terminal {
                    show(CLEAR_LINE);
                }
                return result;
            }
            Err(_) => {
                let seconds = begun.elapsed().as_secs();
                shown = true;
                if terminal {
                    show(&format!("{CLEAR_LINE}waiting … {seconds}s"));
                } else {
                    show(&format!("still waiting after {seconds}s\n"));
                }
            }
        }
    }
}

/// Writes to standard error, now.
pub(super) fn show(text: &str) {
    let mut err = io::stderr().lock();
    // With stderr gone nobody watches.
    let _ = err.write_all(text.as_bytes()).and_then(|()| err.flush());
}

fn no_runtime(error: io::Error) -> Fault {
    Fault::internal(format!("cannot set up: {error}"))
}

/// A text as part of a URL's query.
pub(super) fn encode(text: &str) -> String {
    text.bytes()
        .map(|b| match b {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                char::from(b).to_string()
            }
            _ => format!("%{b:02X}"),
        })
        .collect()
}
