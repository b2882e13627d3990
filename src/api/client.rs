//! A small HTTP client for the two ends we talk to: a node's socket on this machine, another node's HTTP port.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::{Builder, Runtime};

/// The largest answer taken, in bytes: an inspection of some thousand volumes; more is a fault of the other end.
const ANSWER_MAX: usize = 32 << 20;
/// The longest line of a stream, in bytes. An event is at most some kilobytes.
const LINE_MAX: usize = 1 << 20;
/// How long to wait for a connection to a socket on this machine.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// Whom to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A socket on this machine.
    Unix(PathBuf),
    /// `HOST:PORT`.
    Tcp(String),
}

/// A `--host` that is no address.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is not a host: use unix:PATH, for example unix:/run/lockstep/api.sock")]
pub struct BadTarget(String);

impl FromStr for Target {
    type Err = BadTarget;

    fn from_str(text: &str) -> Result<Self, BadTarget> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(BadTarget(text.into())),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => f.write_str(address),
        }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody takes connections there.
    #[error("{0}")]
    Connect(io::Error),
    /// The conversation broke off.
    #[error("{0}")]
    Broken(String),
    /// No answer in time.
    #[error("no answer within {}s", .0.as_secs_f64())]
    Late(Duration),
}

/// An answer, whole.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its body.
    pub body: Bytes,
}

fn broken(error: impl fmt::Display) -> ClientError {
    ClientError::Broken(error.to_string())
}

/// A runtime for one caller that may block.
pub fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

/// Asks, and waits at most `patience` (`None`: as long as it takes) for the whole answer.
pub async fn ask(
    target: &Target,
    method: Method,
    path: &str,
    body: Option<Vec<u8>>,
    patience: Option<Duration>,
) -> Result<Answer, ClientError> {
    let exchange = async {
        let response = send(target, method, path, body).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_MAX)
            .collect()
            .await
            .map_err(broken)?
            .to_bytes();
        Ok(Answer { status, body })
    };
    match patience {
        Some(patience) => tokio::time::timeout(patience, exchange)
            .await
            .unwrap_or(Err(ClientError::Late(patience))),
        None => exchange.await,
    }
}

/// Asks for a stream of lines and hands each to `take` until it returns `false` or the stream ends. An answer that is
/// not a success comes back whole.
pub async fn ask_lines(
    target: &Target,
    path: &str,
    mut take: impl FnMut(&str) -> bool,
) -> Result<Answer, ClientError> {
    let response = send(target, Method::GET, path, None).await?;
    let status = response.status();
    let mut body = response.into_body();
    let mut rest: Vec<u8> = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(broken)?.into_data() else {
            continue;
        };
        rest.extend_from_slice(&data);
        if rest.len() > LINE_MAX {
            return Err(broken("a line of the stream is too long"));
        }
        if !status.is_success() {
            continue;
        }
        while let Some(end) = rest.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            let text = String::from_utf8_lossy(&line[..end]);
            if !text.trim().is_empty() && !take(&text) {
                return Ok(Answer {
                    status,
                    body: Bytes::new(),
                });
            }
        }
    }
    Ok(Answer {
        status,
        body: rest.into(),
    })
}

async fn send(
    target: &Target,
    method: Method,
    path: &str,
    body: Option<Vec<u8>>,
) -> Result<Response<Incoming>, ClientError> {
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "lockstep");
    if body.is_some() {
        request = request.header("content-type", "application/json");
    }
    let request = request
        .body(Full::new(Bytes::from(body.unwrap_or_default())))
        .map_err(broken)?;
    let connect = async {
        Ok(match target {
            Target::Unix(path) => Stream::Unix(UnixStream::connect(path).await?),
            Target::Tcp(address) => Stream::Tcp(TcpStream::connect(address).await?),
        })
    };
    let stream = tokio::time::timeout(CONNECT_PATIENCE, connect)
        .await
        .map_err(|_| ClientError::Late(CONNECT_PATIENCE))?
        .map_err(ClientError::Connect)?;
    match stream {
        Stream::Unix(s) => talk(s, request).await,
        Stream::Tcp(s) => talk(s, request).await,
    }
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

async fn talk<S>(
    stream: S,
    request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, ClientError>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(broken)?;
    // Its errors come out of the request as well.
    tokio::spawn(async move { drop(connection.await) });
    sender.send_request(request).await.map_err(broken)
}
