//! gRPC, as much of it as etcd needs, over one HTTP/2 connection: <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>.
//!
//! Above all it tells apart what [`super::CasError`] must tell apart: a request that never left, one that etcd answered,
//! and one of which nobody knows what became of it.

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper::header::HeaderValue;
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::etcd_proto::AUTHENTICATE;

/// The longest message taken, in bytes: a listing of some ten thousand volumes. More is a fault of the other end.
const MESSAGE_MAX: usize = 64 << 20;
/// What one stream may have on its way to us, in bytes. A watch whose reader is slow holds this much.
const STREAM_WINDOW: u32 = 1 << 20;
/// What all streams of a connection may have on their way, in bytes: slow watches must leave room for answers.
const CONNECTION_WINDOW: u32 = 32 << 20;
/// A connection that is waited on and silent is asked for a sign of life this often. etcd hangs up on whoever asks more
/// often than every 5 s.
const PING_EVERY: Duration = Duration::from_secs(10);
/// How long the sign of life may take.
const PING_PATIENCE: Duration = Duration::from_secs(3);
/// Before each message: a byte that says whether it is compressed, and four for its length.
const PREFIX: usize = 5;

/// Why a call has no answer.
#[derive(Clone, Debug)]
pub(super) enum Failure {
    /// The request never left.
    Unsent(String),
    /// The request left, or may have: it may have been carried out.
    Lost(String),
    /// etcd, or what is in front of it, says no. Whether that means "not carried out" depends on the code.
    Refused(Code, String),
}

/// gRPC's status codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Code(pub u32);

impl Code {
    pub const INVALID_ARGUMENT: Self = Self(3);
    pub const NOT_FOUND: Self = Self(5);
    pub const PERMISSION_DENIED: Self = Self(7);
    pub const RESOURCE_EXHAUSTED: Self = Self(8);
    pub const FAILED_PRECONDITION: Self = Self(9);
    pub const OUT_OF_RANGE: Self = Self(11);
    pub const UNIMPLEMENTED: Self = Self(12);
    pub const UNAVAILABLE: Self = Self(14);
    pub const UNAUTHENTICATED: Self = Self(16);
}

/// One connection to one member.
pub(super) struct Channel {
    sender: SendRequest<Full<Bytes>>,
    /// What requests name as their target: `http://HOST:PORT`.
    pub address: String,
    token: Mutex<Option<HeaderValue>>,
    given_up: AtomicBool,
    driver: AbortHandle,
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Channel {
    /// Speaks HTTP/2 over `stream`. That somebody answers is known only after the first call.
    pub(super) async fn over<S>(stream: S, address: String) -> Result<Self, String>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (sender, connection) = Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_PATIENCE)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|e| whole(&e))?;
        // Its errors come out of the calls as well.
        let driver = tokio::spawn(async move { drop(connection.await) }).abort_handle();
        Ok(Self {
            sender,
            address,
            token: Mutex::default(),
            given_up: AtomicBool::new(false),
            driver,
        })
    }

    /// Ends the connection under whoever waits on it.
    pub(super) fn close(&self) {
        self.given_up.store(true, Ordering::Release);
        self.driver.abort();
    }

    /// Whether it has ended, or is about to.
    pub(super) fn is_closed(&self) -> bool {
        self.given_up.load(Ordering::Acquire) || self.sender.is_closed()
    }

    /// What [`Channel::call`] proves our identity with from now on.
    pub(super) fn set_token(&self, token: Option<HeaderValue>) {
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = token;
    }

    /// One question, one answer, at most `patience` later.
    pub(super) async fn call<Q: Message, A: Message + Default>(
        &self,
        path: &str,
        question: &Q,
        patience: Duration,
    ) -> Result<A, Failure> {
        let exchange = async {
            let mut stream = self.open(path, question, Some(patience)).await?;
            let answer = stream.next().await?;
            // The status comes behind the answer, and only with it the answer counts.
            match (answer, stream.next::<A>().await?) {
                (Some(answer), None) => Ok(answer),
                _ => Err(Failure::Lost(
                    "the answer is not one message; is this etcd?".into(),
                )),
            }
        };
        timeout(patience, exchange)
            .await
            .unwrap_or_else(|_| Err(Failure::Lost(late(patience))))
    }

    /// One question, many answers.
    pub(super) async fn open<Q: Message>(
        &self,
        path: &str,
        question: &Q,
        patience: Option<Duration>,
    ) -> Result<Stream, Failure> {
        let request = self
            .request(path, question, patience)
            .map_err(|e| Failure::Unsent(whole(&e)))?;
        let sent = self.sender.clone().try_send_request(request).await;
        let response = sent.map_err(|mut e| {
            let why = whole(e.error());
            // hyper gives back what it never wrote.
            match e.take_message() {
                Some(_) => Failure::Unsent(why),
                None => Failure::Lost(why),
            }
        })?;
        Stream::of(response)
    }

    fn request<Q: Message>(
        &self,
        path: &str,
        question: &Q,
        patience: Option<Duration>,
    ) -> Result<Request<Full<Bytes>>, hyper::http::Error> {
        let mut request = Request::post(format!("{}{path}", self.address))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            // A member that is cut off from the others says so at once instead of waiting for them.
            .header("hasleader", "true");
        if let Some(patience) = patience {
            request = request.header("grpc-timeout", format!("{}m", patience.as_millis()));
        }
        // A log-in shows no token: etcd refuses whoever comes with one that it does not know any more, a new password or not.
        let token = self
            .token
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
            .filter(|_| path != AUTHENTICATE);
        if let Some(token) = token {
            request = request.header("token", token);
        }
        let length = question.encoded_len();
        let mut body = Vec::with_capacity(PREFIX + length);
        body.push(0);
        // Our own messages are some MiB at most (VALUE_MAX).
        body.extend_from_slice(&(length as u32).to_be_bytes());
        body.extend_from_slice(&question.encode_to_vec());
        request.body(Full::new(body.into()))
    }
}

/// The answers to one question.
pub(super) struct Stream {
    body: Incoming,
    buffer: Vec<u8>,
    ended: bool,
}

impl Stream {
    fn of(response: Response<Incoming>) -> Result<Self, Failure> {
        let status = response.status();
        if status != StatusCode::OK {
            return Err(Failure::Lost(format!(
                "the answer is HTTP {status}; is this etcd?"
            )));
        }
        // A call that fails at once is told in the headers.
        if response.headers().contains_key("grpc-status") {
            refusal(response.headers())?;
        }
        Ok(Self {
            body: response.into_body(),
            buffer: Vec::new(),
            ended: false,
        })
    }

    /// The next answer; `None`: that was all, and it went well.
    pub(super) async fn next<A: Message + Default>(&mut self) -> Result<Option<A>, Failure> {
        loop {
            if let Some(message) = take_message(&mut self.buffer)? {
                return A::decode(&*message)
                    .map(Some)
                    .map_err(|e| Failure::Lost(format!("the answer cannot be read: {e}")));
            }
            if self.ended {
                return Ok(None);
            }
            let Some(frame) = self.body.frame().await else {
                return Err(Failure::Lost("the answer broke off".into()));
            };
            let frame = frame.map_err(|e| Failure::Lost(whole(&e)))?;
            match frame.into_data() {
                Ok(data) => self.buffer.extend_from_slice(&data),
                Err(frame) => {
                    if let Ok(trailers) = frame.into_trailers() {
                        refusal(&trailers)?;
                        self.ended = true;
                    }
                }
            }
        }
    }
}

/// The first whole message in `buffer`, taken out of it.
fn take_message(buffer: &mut Vec<u8>) -> Result<Option<Vec<u8>>, Failure> {
    let Some(&[compressed, a, b, c, d]) = buffer.first_chunk::<PREFIX>() else {
        return Ok(None);
    };
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    if compressed != 0 || length > MESSAGE_MAX {
        return Err(Failure::Lost(format!(
            "an answer of {length} bytes, compression {compressed}: not taken"
        )));
    }
    if buffer.len() < PREFIX + length {
        return Ok(None);
    }
    let rest = buffer.split_off(PREFIX + length);
    let mut message = std::mem::replace(buffer, rest);
    message.drain(..PREFIX);
    Ok(Some(message))
}

/// `Ok` for status 0.
fn refusal(headers: &HeaderMap) -> Result<(), Failure> {
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
    match text("grpc-status").and_then(|s| s.parse().ok()) {
        Some(0) => Ok(()),
        Some(code) => Err(Failure::Refused(
            Code(code),
            percent_decoded(text("grpc-message").unwrap_or("no reason given")),
        )),
        None => Err(Failure::Lost("an answer without a status".into())),
    }
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped = (*first == b'%')
            .then(|| std::str::from_utf8(tail.get(..2)?).ok())
            .flatten()
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        (rest, _) = match escaped {
            Some(byte) => (&tail[2..], bytes.push(byte)),
            None => (tail, bytes.push(*first)),
        };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

pub(super) fn late(patience: Duration) -> String {
    format!("no answer within {}s", patience.as_secs_f64())
}

/// An error with its causes, which hyper keeps to itself: "client error (…): connection reset".
pub(super) fn whole(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        let more = e.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = e.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_cut_out_of_a_stream_of_bytes() {
        let mut buffer = vec![0, 0, 0, 0, 2, b'a'];
        assert!(take_message(&mut buffer).unwrap().is_none());
        buffer.extend_from_slice(&[b'b', 0, 0, 0, 0, 0, 0]);
        assert_eq!(take_message(&mut buffer).unwrap().unwrap(), b"ab");
        assert_eq!(take_message(&mut buffer).unwrap().unwrap(), b"");
        assert_eq!(buffer, [0]);
        for bad in [[1, 0, 0, 0, 0], [0, 0xff, 0, 0, 0]] {
            assert!(take_message(&mut bad.to_vec()).is_err());
        }
    }

    #[test]
    fn a_status_is_read_from_headers() {
        let headers = |pairs: &[(&'static str, &'static str)]| {
            let mut map = HeaderMap::new();
            for (name, value) in pairs {
                map.insert(*name, HeaderValue::from_static(value));
            }
            map
        };
        assert!(refusal(&headers(&[("grpc-status", "0")])).is_ok());
        match refusal(&headers(&[
            ("grpc-status", "14"),
            ("grpc-message", "no%20leader%"),
        ])) {
            Err(Failure::Refused(Code(14), why)) => assert_eq!(why, "no leader%"),
            other => panic!("{other:?}"),
        }
        for bad in [&[][..], &[("grpc-status", "x")]] {
            assert!(matches!(refusal(&headers(bad)), Err(Failure::Lost(_))));
        }
    }
}
