//! Which other nodes this one reaches on the way that data takes: the replication port, asked every few seconds.
//!
//! A node that answers over HTTP may be cut off where its copies are written, and one that holds a lease in the registry may
//! be cut off from every other node. So each node greets every other one as the engine would, with a [`Hello`] that asks
//! for no copy, and takes the refusal for the proof: the way is open, and the right node of the right cluster is at its
//! end. What comes of it is shown to people and decides nothing about data.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{timeout, timeout_at};
use tokio_rustls::TlsConnector;

use super::events::What;
use super::plane::Plane;
use crate::api::client::runtime;
use crate::replication::ids::{BootId, ClusterId, CopyId, Instance, NodeName, VolumeId};
use crate::wire::hello::{
    Answer, FEATURES, GREETING_MAX, Hello, HelloRefusal, Purpose, Reason, VERSIONS,
};
use crate::wire::tls::{ENDED, Security, server_name};

/// How often each node is greeted. With ten nodes each answers two greetings a second.
const PERIOD: Duration = Duration::from_secs(5);
/// After a greeting that failed, the next one comes sooner.
const AGAIN: Duration = Duration::from_secs(1);
/// Failures in a row before a node counts as not reached: the restart of a process is no cut.
const FAILURES: u32 = 2;
/// How long connecting and greeting may take. A packet that is lost is sent again after a second.
const PATIENCE: Duration = Duration::from_secs(2);
/// How late a stop, or a node that is new, is seen.
const NAP: Duration = Duration::from_millis(200);

/// The way from one node to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    /// The other node.
    pub node: NodeName,
    /// Whether it is reached.
    pub reached: bool,
    /// Since when it is, or is not, in milliseconds before now.
    pub for_ms: u64,
    /// Why it is not; empty when it is.
    pub why: String,
    /// It is not reached, and what it sends arrives here: its connections begin, and our answers are lost.
    #[serde(default)]
    pub heard: bool,
}

/// What is known of the way to one node.
struct Known {
    reached: bool,
    since: Instant,
    why: String,
    heard: bool,
}

/// Why a greeting was not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Lost {
    why: String,
    heard: bool,
}

struct Peer {
    address: SocketAddr,
    /// `None` until there is something to say.
    known: Option<Known>,
    failures: u32,
    /// The first of them.
    failing: Instant,
    /// When it is greeted next; `None`: it is being greeted.
    due: Option<Instant>,
}

/// The ways from this node.
#[derive(Default)]
pub struct Reach {
    peers: Mutex<BTreeMap<NodeName, Peer>>,
}

impl Reach {
    /// The other nodes of the cluster and where they take replication connections; `me` among them is passed over.
    pub(super) fn peers_changed(&self, me: &NodeName, peers: &[(NodeName, SocketAddr)]) {
        let now = Instant::now();
        let mut known = self.lock();
        known.retain(|name, _| peers.iter().any(|(n, _)| n == name));
        for (name, address) in peers.iter().filter(|(name, _)| name != me) {
            match known.get_mut(name) {
                Some(peer) if peer.address == *address => {}
                Some(peer) => {
                    peer.address = *address;
                    // An answer that is under way is the old address's.
                    peer.due = Some(now);
                    peer.failures = 0;
                }
                None => {
                    let peer = Peer {
                        address: *address,
                        known: None,
                        failures: 0,
                        failing: now,
                        due: Some(now),
                    };
                    known.insert(name.clone(), peer);
                }
            }
        }
    }

    /// The ways of which something is known, in the order of the nodes' names.
    pub fn ways(&self) -> Vec<Way> {
        let now = Instant::now();
        let known = self.lock();
        let ways = known.iter().filter_map(|(name, peer)| {
            let known = peer.known.as_ref()?;
            let span = now.saturating_duration_since(known.since);
            Some(Way {
                node: name.clone(),
                reached: known.reached,
                for_ms: u64::try_from(span.as_millis()).unwrap_or(u64::MAX),
                why: known.why.clone(),
                heard: known.heard,
            })
        });
        ways.collect()
    }

    /// Whether the node's copies are reached, as far as is known.
    pub(super) fn reaches(&self, node: &NodeName) -> bool {
        let known = self.lock();
        let known = known.get(node).and_then(|peer| peer.known.as_ref());
        known.is_some_and(|known| known.reached)
    }

    /// Whom to greet now. Each is noted to be under way.
    fn take_due(&self, now: Instant) -> Vec<(NodeName, SocketAddr)> {
        let mut peers = self.lock();
        let due = peers
            .iter_mut()
            .filter(|(_, peer)| peer.due.is_some_and(|at| at <= now));
        due.map(|(name, peer)| {
            peer.due = None;
            (name.clone(), peer.address)
        })
        .collect()
    }

    /// Takes in what became of a greeting; says what has changed by it, if anything people want to know.
    fn note(
        &self,
        name: &NodeName,
        address: SocketAddr,
        result: Result<(), Lost>,
        now: Instant,
        spread: impl Fn(Duration) -> Duration,
    ) -> Option<What> {
        let mut peers = self.lock();
        let peer = peers.get_mut(name).filter(|p| p.address == address)?;
        let was = peer.known.as_ref().map(|k| k.reached);
        let Err(Lost { why, heard }) = result else {
            peer.failures = 0;
            peer.due = Some(now + spread(PERIOD));
            if was == Some(true) {
                return None;
            }
            let before = peer.known.replace(Known {
                reached: true,
                since: now,
                why: String::new(),
                heard: false,
            })?;
            let span = now.saturating_duration_since(before.since).as_secs();
            let text = format!("node {name} is reached again after {span}s");
            return Some(What::node("not reached", "reached", "reach").text(text));
        };
        if peer.failures == 0 {
            peer.failing = now;
        }
        peer.failures = peer.failures.saturating_add(1);
        let early = peer.failures < FAILURES;
        peer.due = Some(now + spread(if early { AGAIN } else { PERIOD }));
        if early {
            return None;
        }
        let text = format!("node {name} is not reached at {address}: {why}");
        let since = match &peer.known {
            Some(known) if !known.reached => known.since,
            _ => peer.failing,
        };
        peer.known = Some(Known {
            reached: false,
            since,
            why,
            heard,
        });
        (was != Some(false)).then(|| What::node("reached", "not reached", "reach").text(text))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeName, Peer>> {
        // Each change is whole before anything in it can panic.
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Greets the other nodes until the node stops.
///
/// `port` is where this one takes replication connections.
pub(super) fn run(plane: &Plane, security: &Security, port: u16, stop: &AtomicBool) {
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(e) => return log::error!("other nodes are not greeted: {e}"),
    };
    let hello = hello(plane.cluster, &plane.node, plane.boot_id, plane.instance);
    let hello: Arc<[u8]> = hello.into();
    runtime.block_on(async {
        let mut under_way = JoinSet::new();
        while !stop.load(Ordering::Acquire) {
            for (name, address) in plane.reach.take_due(Instant::now()) {
                let (hello, cluster, security) = (hello.clone(), plane.cluster, security.clone());
                under_way.spawn(async move {
                    let asked = exchange(address, (&security, &name), &hello, PATIENCE);
                    let result = match asked.await {
                        Ok(answer) => judge(&answer, cluster, &name),
                        Err(silent) => Err(silent.why()),
                    };
                    (name, address, result)
                });
            }
            if under_way.is_empty() {
                tokio::time::sleep(NAP).await;
                continue;
            }
            let Ok(Some(Ok((name, address, result)))) = timeout(NAP, under_way.join_next()).await
            else {
                continue;
            };
            let lost = |why| Lost {
                why,
                heard: half_open(port).contains(&address.ip()),
            };
            let result = result.map_err(lost);
            let now = Instant::now();
            let changed = plane.reach.note(&name, address, result, now, spread);
            if let Some(what) = changed {
                plane.events.push(what);
            }
        }
    });
}

/// Who began to connect to our port and does not hear our answers.
///
/// A connection needs packets both ways, so one direction that is cut stops those of the other one as well. The kernel knows
/// better: it keeps a connection that begins, and whose beginner it answers in vain, for about a minute.
fn half_open(port: u16) -> BTreeSet<IpAddr> {
    let tables = ["/proc/self/net/tcp", "/proc/self/net/tcp6"];
    let texts = tables.map(|path| std::fs::read_to_string(path).unwrap_or_default());
    let lines = texts.iter().flat_map(|text| text.lines());
    lines.filter_map(|line| beginner(line, port)).collect()
}

/// Who is at the other end of a line of `/proc/net/tcp`, if that is a connection to `port` that has only begun.
fn beginner(line: &str, port: u16) -> Option<IpAddr> {
    /// `TCP_SYN_RECV` in the kernel's `include/net/tcp_states.h`.
    const BEGUN: &str = "03";
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, remote, state) = (fields.next()?, fields.next()?, fields.next()?);
    let (_, local) = local.rsplit_once(':')?;
    if state != BEGUN || u16::from_str_radix(local, 16) != Ok(port) {
        return None;
    }
    let (address, _) = remote.rsplit_once(':')?;
    // Each four bytes are a number as this machine keeps it.
    let word = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok();
    let first = word(0)?.to_ne_bytes();
    if address.len() == 8 {
        return Some(Ipv4Addr::from(first).into());
    }
    let mut bytes = [0; 16];
    for (i, part) in bytes.chunks_exact_mut(4).enumerate() {
        part.copy_from_slice(&word(8 * i)?.to_ne_bytes());
    }
    // A socket for both kinds shows the old one as a part of the new one.
    Some(Ipv6Addr::from(bytes).to_canonical())
}

/// Four to six fifths of a span, so that many nodes do not keep step.
fn spread(span: Duration) -> Duration {
    let mut random = [0];
    // Without randomness they may keep step.
    let _ = getrandom::fill(&mut random);
    span * 4 / 5 + span * 2 / 5 * u32::from(random[0]) / 255
}

/// A greeting that asks for no copy.
pub(super) fn hello(
    cluster: ClusterId,
    node: &NodeName,
    boot_id: BootId,
    instance: Instance,
) -> Vec<u8> {
    let mut hello = Vec::new();
    Hello {
        versions: VERSIONS,
        features: FEATURES,
        cluster,
        node: node.clone(),
        boot_id,
        instance,
        // Nobody has this one.
        volume: VolumeId([0; 16]),
        copy: CopyId([0; 16]),
        purpose: Purpose::Foreground,
    }
    .encode(&mut hello);
    hello
}

/// Why a greeting has no answer.
#[derive(Debug)]
pub(super) enum Silent {
    /// Nobody takes connections there, as far as can be seen from here.
    Nobody(String),
    /// Whoever takes them says nothing, or not all of it.
    Mute(String),
    /// Whoever takes them is no node.
    Stranger(String),
}

impl Silent {
    fn why(self) -> String {
        match self {
            Self::Nobody(why) | Self::Mute(why) | Self::Stranger(why) => why,
        }
    }
}

/// Greets whoever is at `address`, which has `patience` for everything together; what `security` asks for, as node `name`.
pub(super) async fn exchange(
    address: SocketAddr,
    (security, name): (&Security, &NodeName),
    hello: &[u8],
    patience: Duration,
) -> Result<Answer, Silent> {
    let late = || format!("no answer within {}s", patience.as_secs());
    let until = tokio::time::Instant::now() + patience;
    let connect = || async {
        match timeout_at(until, TcpStream::connect(address)).await {
            Ok(connected) => connected.map_err(|e| Silent::Nobody(e.to_string())),
            Err(_) => Err(Silent::Nobody(late())),
        }
    };
    let mut stream = connect().await?;
    let greeted = async {
        if let Some(config) = security.client() {
            let name = server_name(name).map_err(Silent::Mute)?;
            match TlsConnector::from(config).connect(name, stream).await {
                Ok(secured) => return greet(secured, hello).await,
                Err(_) if security.takes_plaintext() => stream = connect().await?,
                Err(e) if e.kind() == ErrorKind::UnexpectedEof => {
                    return Err(Silent::Mute(ENDED.into()));
                }
                Err(e) => return Err(Silent::Mute(format!("no TLS: {e}"))),
            }
        }
        greet(stream, hello).await
    };
    timeout_at(until, greeted)
        .await
        .unwrap_or_else(|_| Err(Silent::Mute(late())))
}

async fn greet(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    hello: &[u8],
) -> Result<Answer, Silent> {
    let broken = |e: std::io::Error| Silent::Mute(e.to_string());
    stream.write_all(hello).await.map_err(broken)?;
    stream.flush().await.map_err(broken)?;
    let (mut input, mut received) = ([0; GREETING_MAX], 0);
    loop {
        match Answer::decode(&input[..received]) {
            Ok(Some((answer, _))) => return Ok(answer),
            Ok(None) => {}
            Err(e) => {
                return Err(Silent::Stranger(format!(
                    "its answer is not understood: {e}"
                )));
            }
        }
        // A greeting is never longer than what there is room for.
        match stream.read(&mut input[received..]).await.map_err(broken)? {
            0 => {
                let why = "it closed the connection without an answer";
                return Err(Silent::Mute(why.into()));
            }
            n => received += n,
        }
    }
}

/// Whether the answer proves that the way to node `name` of `cluster` is open.
fn judge(answer: &Answer, cluster: ClusterId, name: &NodeName) -> Result<(), String> {
    let other = |node: &NodeName| format!("node {node} answers at its address");
    match answer {
        Answer::Ack(ack) if ack.cluster != cluster => {
            Err(format!("a node of cluster {} answers", ack.cluster))
        }
        Answer::Ack(ack) if ack.node != *name => Err(other(&ack.node)),
        Answer::Ack(_) => Ok(()),
        Answer::Refusal(HelloRefusal {
            node: Some(node),
            reason: Reason::UnknownCopy | Reason::Busy,
            ..
        }) if node != name => Err(other(node)),
        Answer::Refusal(HelloRefusal {
            reason: Reason::UnknownCopy | Reason::Busy,
            ..
        }) => Ok(()),
        // Of another cluster, of a version too far away, or something that is yet to come: no data goes there.
        Answer::Refusal(refusal) => Err(refusal.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fixture::node;

    const PLACE: &str = "127.0.0.2:5703";

    fn place() -> SocketAddr {
        PLACE.parse().unwrap()
    }

    fn lost(why: &str) -> Lost {
        Lost {
            why: why.into(),
            heard: false,
        }
    }

    fn only(reach: &Reach) -> Vec<(bool, String)> {
        let ways = reach.ways().into_iter();
        ways.map(|w| (w.reached, w.why)).collect()
    }

    #[test]
    fn a_way_is_lost_with_the_second_failure_and_back_with_the_first_answer() {
        // Each step: the result, whether that is worth an event, what is known then.
        let late = || Err(lost("late"));
        let reset = || Err(lost("reset"));
        type Step = (Result<(), Lost>, bool, Option<(bool, &'static str)>);
        let steps: [Step; 9] = [
            (late(), false, None),
            (Ok(()), false, Some((true, ""))),
            (late(), false, Some((true, ""))),
            (Ok(()), false, Some((true, ""))),
            (late(), false, Some((true, ""))),
            (late(), true, Some((false, "late"))),
            (reset(), false, Some((false, "reset"))),
            (Ok(()), true, Some((true, ""))),
            (Ok(()), false, Some((true, ""))),
        ];
        let (reach, me, it) = (Reach::default(), node("n1"), node("n2"));
        reach.peers_changed(&me, &[(me.clone(), place()), (it.clone(), place())]);
        let mut now = Instant::now() + AGAIN;
        for (i, (result, event, known)) in steps.into_iter().enumerate() {
            let ok = result.is_ok();
            assert_eq!(reach.take_due(now).len(), 1, "step {i}: it is due");
            assert!(reach.take_due(now).is_empty(), "step {i}: and asked once");
            let changed = reach.note(&it, place(), result, now, |span| span);
            assert_eq!(changed.is_some(), event, "step {i}: {changed:?}");
            let known: Vec<_> = known.map(|(r, why)| (r, why.into())).into_iter().collect();
            assert_eq!(only(&reach), known, "step {i}");
            // Sooner after a first failure.
            let soon = !reach.take_due(now + AGAIN).is_empty();
            assert_eq!(soon, !ok && !matches!(i, 5 | 6), "step {i}");
            let mut peers = reach.lock();
            now += PERIOD;
            peers.get_mut(&it).unwrap().due = Some(now);
        }
    }

    #[test]
    fn silence_is_counted_from_the_first_greeting_that_was_not_answered() {
        let (reach, it) = (Reach::default(), node("n2"));
        reach.peers_changed(&node("n1"), &[(it.clone(), place())]);
        let start = Instant::now();
        let fail = |after: u64| {
            let at = start + Duration::from_secs(after);
            reach.note(&it, place(), Err(lost("late")), at, |span| span)
        };
        assert!(fail(1).is_none());
        let text = fail(2).unwrap().text;
        assert_eq!(text, format!("node n2 is not reached at {PLACE}: late"));
        fail(7);
        let back = start + Duration::from_secs(13);
        let what = reach.note(&it, place(), Ok(()), back, |span| span).unwrap();
        assert_eq!(what.text, "node n2 is reached again after 12s");
    }

    #[test]
    fn a_node_that_moved_is_greeted_there_and_one_that_left_is_forgotten() {
        let (reach, me, it) = (Reach::default(), node("n1"), node("n2"));
        let elsewhere: SocketAddr = "127.0.0.9:5703".parse().unwrap();
        reach.peers_changed(&me, &[(it.clone(), place())]);
        let now = Instant::now();
        reach.take_due(now);
        reach.peers_changed(&me, &[(it.clone(), elsewhere)]);
        // The old address's answer says nothing.
        assert!(reach.note(&it, place(), Ok(()), now, |span| span).is_none());
        assert!(reach.ways().is_empty());
        let due = reach.take_due(Instant::now());
        assert_eq!(due, [(it.clone(), elsewhere)]);
        reach.note(&it, elsewhere, Ok(()), now, |span| span);
        assert_eq!(only(&reach), [(true, String::new())]);
        reach.peers_changed(&me, &[]);
        assert!(reach.ways().is_empty());
    }

    #[test]
    fn connections_that_have_only_begun_are_found_in_the_kernels_table() {
        let head =
            "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid";
        let ip = |text: &str| Some(text.parse::<IpAddr>().unwrap());
        // As a little-endian machine writes them.
        let word = |bytes: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(bytes));
        let (me, it) = (word([10, 0, 0, 1]), word([10, 0, 0, 2]));
        let mapped = format!("{0}{0}{1}{it}", word([0; 4]), word([0, 0, 0xff, 0xff]));
        let six = [[0xfd, 0, 0, 0], [0; 4], [0; 4], [0, 0, 0, 2]]
            .map(word)
            .concat();
        for (line, found) in [
            (head.to_string(), None),
            (String::new(), None),
            (format!("0: {me}:1647 00000000:0000 0A 0"), None),
            (format!("1: {me}:1647 {it}:8A2C 01 0"), None),
            (format!("2: {me}:1647 {it}:8A2C 03 0"), ip("10.0.0.2")),
            (format!("3: {me}:1649 {it}:8A2C 03 0"), None),
            (
                format!("4: {mapped}:1647 {mapped}:8A2C 03 0"),
                ip("10.0.0.2"),
            ),
            (format!("5: {six}:1647 {six}:8A2C 03 0"), ip("fd00::2")),
            ("6: x:1647 y:8A2C 03 0".into(), None),
        ] {
            assert_eq!(beginner(&line, 5703), found, "{line}");
        }
    }

    #[test]
    fn only_the_right_node_of_the_right_cluster_proves_the_way() {
        let ours = ClusterId([1; 16]);
        let refusal = |reason, by: Option<&str>| {
            let refusal = HelloRefusal::new(reason, "words");
            Answer::Refusal(match by {
                Some(name) => refusal.by(&node(name)),
                None => refusal,
            })
        };
        for (answer, expected) in [
            (refusal(Reason::UnknownCopy, Some("n2")), Ok(())),
            (refusal(Reason::UnknownCopy, None), Ok(())),
            (refusal(Reason::Busy, Some("n2")), Ok(())),
            (
                refusal(Reason::UnknownCopy, Some("n3")),
                Err("node n3 answers at its address"),
            ),
            (
                refusal(Reason::WrongCluster, Some("n2")),
                Err("refused: words"),
            ),
            (
                refusal(Reason::NoCommonVersion, None),
                Err("refused: words"),
            ),
            (refusal(Reason::Other(9), Some("n2")), Err("refused: words")),
        ] {
            let judged = judge(&answer, ours, &node("n2"));
            assert_eq!(judged, expected.map_err(String::from), "{answer:?}");
        }
    }
}
