//! Whether the process that a node's record describes runs: asked where it should be, and by name, since an address may be
//! another's by now.
//!
//! Who takes connections there and says nothing may be that process, hung: it is taken for alive. Only an answer in another
//! name proves that it is not there.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::fault::Fault;
use super::live::Identity;
use super::model::NodeRecord;
use super::reach::{Silent, exchange, hello};
use crate::api::client::{ClientError, Target, ask, runtime};
use crate::replication::ids::{BootId, ClusterId, Instance, NodeName};
use crate::wire::hello::{Answer, GREETING_MAX, Hello, HelloRefusal, Reason};
use crate::wire::tls::Security;

/// How long a running process has to answer. A node answers in milliseconds.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks whether somebody asks us.
const LOOK: Duration = Duration::from_millis(20);
/// Who asks. It wants no copy, so nobody looks.
const ASKER: &str = "lockstep";

/// Who is at an address.
#[derive(Debug, PartialEq, Eq)]
enum Who {
    /// The node, or somebody who does not say who it is.
    Node(String),
    /// Somebody else, so that the node is not there.
    Other,
    /// Nobody who takes connections.
    Nobody,
}

/// What says that a process runs as the node, a hung one included.
pub(super) fn alive(cluster: ClusterId, node: &NodeRecord) -> Result<Option<String>, Fault> {
    match listens(cluster, node)? {
        Who::Node(how) => Ok(Some(how)),
        // It takes both its ports or none.
        Who::Other => Ok(None),
        Who::Nobody => http_alive(cluster, node),
    }
}

/// Who takes replication connections at the node's address.
fn listens(cluster: ClusterId, node: &NodeRecord) -> Result<Who, Fault> {
    let at = &node.address;
    // A name that does not resolve is nobody's address.
    let addresses: Vec<SocketAddr> = at.to_socket_addrs().map_or(Vec::new(), Iterator::collect);
    let runtime = runtime().map_err(|e| Fault::internal(e.to_string()))?;
    let hello = hello(
        cluster,
        &NodeName(ASKER.into()),
        BootId([0; 16]),
        Instance([0; 16]),
    );
    let mut found = Who::Nobody;
    for address in addresses {
        // Who takes nothing but TLS says its name in the refusal, and nothing else is wanted.
        let plain = (&Security::Plaintext, &node.name);
        let answer = runtime.block_on(exchange(address, plain, &hello, PATIENCE));
        match judge(answer, cluster, &node.name, at) {
            Who::Nobody => {}
            Who::Other => found = Who::Other,
            it @ Who::Node(_) => return Ok(it),
        }
    }
    Ok(found)
}

fn judge(answer: Result<Answer, Silent>, cluster: ClusterId, name: &NodeName, at: &str) -> Who {
    let named = |node: &NodeName| match node == name {
        true => Who::Node(format!("it answers on {at}")),
        false => Who::Other,
    };
    match answer {
        Ok(Answer::Ack(ack)) if ack.cluster != cluster => Who::Other,
        Ok(Answer::Ack(ack)) => named(&ack.node),
        Ok(Answer::Refusal(refusal)) if refusal.reason == Reason::WrongCluster => Who::Other,
        // Of an older version, which did not say its name.
        Ok(Answer::Refusal(refusal)) => match &refusal.node {
            Some(node) => named(node),
            None => Who::Node(format!("a node answers on {at}")),
        },
        Err(Silent::Nobody(_)) => Who::Nobody,
        Err(Silent::Stranger(_)) => Who::Other,
        Err(Silent::Mute(_)) => {
            Who::Node(format!("{at} takes connections and does not say who it is"))
        }
    }
}

/// What says that the process `node` describes answers on its HTTP address.
pub(super) fn http_alive(cluster: ClusterId, node: &NodeRecord) -> Result<Option<String>, Fault> {
    let runtime = runtime().map_err(|e| Fault::internal(e.to_string()))?;
    let target = Target::Tcp(node.http.clone());
    let asked = ask(
        &target,
        hyper::Method::GET,
        "/healthz",
        None,
        Some(PATIENCE),
    );
    Ok(match runtime.block_on(asked) {
        Ok(answer) => {
            let who: Option<Identity> = serde_json::from_slice(&answer.body).ok();
            who.is_some_and(|w| w.cluster == cluster && w.instance == node.instance)
                .then(|| format!("it answers on {}", node.http))
        }
        Err(ClientError::Late(_)) => connects(&node.http)
            .then(|| format!("{} takes connections and does not answer", node.http)),
        Err(ClientError::Connect(_) | ClientError::Broken(_)) => None,
    })
}

/// Whether anything accepts connections on `HOST:PORT`.
fn connects(address: &str) -> bool {
    address.to_socket_addrs().is_ok_and(|mut addresses| {
        addresses.any(|a| TcpStream::connect_timeout(&a, PATIENCE).is_ok())
    })
}

/// Does `work`, and tells whoever greets our replication port meanwhile who we are: two nodes that have changed places and
/// start at the same time ask each other, and each would take the other for its own former process, hung.
pub(super) fn introducing<T>(
    listener: &TcpListener,
    me: &NodeName,
    work: impl FnOnce() -> T,
) -> io::Result<T> {
    listener.set_nonblocking(true)?;
    let done = AtomicBool::new(false);
    Ok(thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                match listener.accept() {
                    // Who does not get an answer asks again.
                    Ok((stream, _)) => drop(introduce(stream, me)),
                    Err(_) => thread::sleep(LOOK),
                }
            }
        });
        let result = work();
        done.store(true, Ordering::Release);
        result
    }))
}

fn introduce(mut stream: TcpStream, me: &NodeName) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE / 4))?;
    let (mut input, mut received) = ([0; GREETING_MAX], 0);
    while let Ok(None) = Hello::decode(&input[..received]) {
        match stream.read(&mut input[received..])? {
            0 => return Ok(()),
            n => received += n,
        }
    }
    let mut answer = Vec::new();
    let refusal = HelloRefusal::new(Reason::Busy, format!("node {me} is starting")).by(me);
    Answer::Refusal(refusal).encode(&mut answer);
    stream.write_all(&answer)
}

/// Whether `HOST:PORT` is where this process listens, by a socket bound to `bound`: whoever had it before has it no more.
pub(super) fn is_ours(address: &str, bound: SocketAddr) -> bool {
    let here = |ip: IpAddr| match bound.ip().is_unspecified() {
        // An address can be bound where it is this machine's, and nowhere else.
        true => UdpSocket::bind((ip, 0)).is_ok(),
        false => ip == bound.ip(),
    };
    address
        .to_socket_addrs()
        .is_ok_and(|mut all| all.any(|a| a.port() == bound.port() && here(a.ip())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fixture::node;
    use crate::wire::hello::{HelloAck, HelloRefusal};

    #[test]
    fn only_an_answer_in_another_name_proves_that_a_node_is_not_there() {
        let (ours, other) = (ClusterId([1; 16]), ClusterId([2; 16]));
        let ack = |cluster, name: &str| {
            Ok(Answer::Ack(HelloAck {
                version: 1,
                features: 0,
                cluster,
                node: node(name),
                boot_id: BootId([0; 16]),
                instance: Instance([0; 16]),
                credits: 1,
            }))
        };
        let no = |reason, by: Option<&str>| {
            let refusal = HelloRefusal::new(reason, "no");
            Ok(Answer::Refusal(match by {
                Some(name) => refusal.by(&node(name)),
                None => refusal,
            }))
        };
        // (what came back, whether n1 may be there)
        for (answer, expected) in [
            (ack(ours, "n1"), Some(true)),
            (ack(ours, "n6"), Some(false)),
            (ack(other, "n1"), Some(false)),
            (no(Reason::UnknownCopy, Some("n1")), Some(true)),
            (no(Reason::Busy, Some("n1")), Some(true)),
            (no(Reason::Other(77), Some("n1")), Some(true)),
            (no(Reason::UnknownCopy, Some("n6")), Some(false)),
            (no(Reason::WrongCluster, Some("n1")), Some(false)),
            (no(Reason::NoCommonVersion, None), Some(true)),
            (Err(Silent::Mute("late".into())), Some(true)),
            (Err(Silent::Stranger("SSH".into())), Some(false)),
            (Err(Silent::Nobody("refused".into())), None),
        ] {
            let text = format!("{answer:?}");
            let found = match judge(answer, ours, &node("n1"), "10.0.0.1:5703") {
                Who::Node(how) => {
                    assert!(how.contains("10.0.0.1:5703"), "{how}");
                    Some(true)
                }
                Who::Other => Some(false),
                Who::Nobody => None,
            };
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn an_address_is_ours_when_our_socket_takes_its_connections() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        for (address, bound, expected) in [
            ("127.0.0.1:5703", "127.0.0.1:5703", true),
            ("127.0.0.1:5703", "127.0.0.1:5704", false),
            ("127.0.0.2:5703", "127.0.0.1:5703", false),
            ("127.0.0.2:5703", "0.0.0.0:5703", true),
            // Of no machine (RFC 5737).
            ("192.0.2.1:5703", "0.0.0.0:5703", false),
            ("nobody.invalid:5703", "0.0.0.0:5703", false),
        ] {
            assert_eq!(is_ours(address, at(bound)), expected, "{address} {bound}");
        }
    }
}
