//! Since when each node does not answer: asked of the node itself every few seconds, whatever the number of volumes.
//!
//! A node is silent when neither way to it is open. One that answers on its replication port alone (a firewall, an HTTP
//! that hangs) has copies that promise and are in sync: nothing would come of replacing them.
//!
//! It decides nothing about data. It tells a detached volume's keeper that a copy has been away for so long that another is
//! to take its place, where no attachment is there to notice; whether the copy really is away, the attachment that is then
//! made for the purpose finds out by the protocol.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::live::{Identity, Question, fan_out};
use super::plane::Plane;
use crate::replication::ids::NodeName;

/// Between two questions to a node: short beside any wait for a lost copy, long enough to be no load.
const ASK: Duration = Duration::from_secs(5);
/// How late a stop is seen.
const NAP: Duration = Duration::from_millis(200);
/// Who is asked where for who answers.
const PATH: &str = "/healthz";

/// Nodes that do not answer, and since when as far as this process has seen.
#[derive(Default)]
pub(super) struct Silence(Mutex<BTreeMap<NodeName, Instant>>);

impl Silence {
    /// Since when the node does not answer; `None`: it does, or was not asked yet.
    pub(super) fn since(&self, node: &NodeName) -> Option<Instant> {
        self.lock().get(node).copied()
    }

    /// Takes in a round of answers; whoever was not asked is not a node any more.
    fn note(&self, asked: Instant, answers: impl Iterator<Item = (NodeName, bool)>) {
        let mut silent = self.lock();
        let before = std::mem::take(&mut *silent);
        *silent = answers
            .filter(|(_, answered)| !answered)
            .map(|(node, _)| {
                let since = before.get(&node).copied().unwrap_or(asked);
                (node, since)
            })
            .collect();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<NodeName, Instant>> {
        // Replaced whole under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks all nodes again and again until the node stops.
pub(super) fn watch(plane: &Plane) {
    while plane.still_running().is_ok() {
        let asked = Instant::now();
        if let Some(snapshot) = plane.known() {
            let others = snapshot.nodes.values().map(|(n, _)| n);
            let questions = others.filter(|n| n.name != plane.node).map(|n| Question {
                node: n.name.clone(),
                address: plane.http_of(n),
                path: PATH.into(),
            });
            let answers = fan_out::<Identity>(questions.collect()).into_iter();
            let is = |(node, answer): (NodeName, Result<Identity, String>)| {
                let it = answer.is_ok_and(|who| who.cluster == plane.cluster && who.node == node);
                let heard = it || plane.reach.reaches(&node);
                (node, heard)
            };
            plane.silence.note(asked, answers.map(is));
        }
        while plane.still_running().is_ok() && asked.elapsed() < ASK {
            thread::sleep(NAP);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fixture::node;

    #[test]
    fn a_silence_is_counted_from_its_first_question_and_ends_with_an_answer() {
        let silence = Silence::default();
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let round = |seconds, n1, n2| {
            let answers = [(node("n1"), n1), (node("n2"), n2)];
            silence.note(at(seconds), answers.into_iter());
        };
        round(0, true, false);
        round(5, false, false);
        assert_eq!(silence.since(&node("n1")), Some(at(5)));
        assert_eq!(silence.since(&node("n2")), Some(at(0)));
        round(10, false, true);
        assert_eq!(silence.since(&node("n1")), Some(at(5)));
        assert_eq!(silence.since(&node("n2")), None);
        round(15, true, false);
        assert_eq!(silence.since(&node("n1")), None);
        assert_eq!(silence.since(&node("n2")), Some(at(15)));
        // Removed from the cluster.
        silence.note(at(20), [(node("n1"), true)].into_iter());
        assert_eq!(silence.since(&node("n2")), None);
    }
}
