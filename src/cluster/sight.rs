//! How nodes are, from everything that is known of them here: who answers, who is announced in the registry, and who says
//! that it reaches whom. One pure function; what it says is for people and decides nothing about data.

use std::collections::BTreeMap;

use super::reach::Way;
use super::units::show_ms;
use crate::registry::Present;
use crate::replication::ids::NodeName;

/// How a node is, as seen from one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It answers.
    Online,
    /// It does not answer here, and something says that it runs all the same.
    Unreachable,
    /// It does not answer, and nothing says that it runs.
    Offline,
}

impl Health {
    /// The word that people are shown.
    pub fn word(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Unreachable => "unreachable",
            Self::Offline => "offline",
        }
    }
}

/// What there is to go by.
#[derive(Debug)]
pub struct Facts<'a> {
    /// The node that looks.
    pub here: &'a NodeName,
    /// Of every node, this one included: the ways from it, or why it did not answer.
    pub nodes: BTreeMap<&'a NodeName, Result<&'a [Way], String>>,
    /// Who is announced in the registry; `None`: nobody could tell.
    pub present: Option<&'a Present>,
}

/// How all nodes are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sight {
    /// Each node's health, and why it is not online.
    pub nodes: BTreeMap<NodeName, (Health, String)>,
    /// Ways that are cut between nodes that run.
    pub cuts: Vec<Cut>,
}

/// A way between two nodes that is cut, in one direction or both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The nodes, in the order of their names.
    pub between: [NodeName; 2],
    /// One sentence.
    pub text: String,
}

impl Sight {
    /// The cuts that a node is at an end of.
    pub fn cuts_of(&self, node: &NodeName) -> Vec<String> {
        let mine = self.cuts.iter().filter(|cut| cut.between.contains(node));
        mine.map(|cut| cut.text.clone()).collect()
    }
}

/// `n3 reaches`, `n3 and n4 reach`, `n3, n4 and n5 reach`.
fn reach(nodes: &[&NodeName]) -> String {
    let [first @ .., last] = nodes else {
        return String::new();
    };
    let first: Vec<&str> = first.iter().map(|n| n.0.as_str()).collect();
    match first.is_empty() {
        true => format!("{last} reaches"),
        false => format!("{} and {last} reach", first.join(", ")),
    }
}

/// `no answer within 2s, for 12s`.
fn because(way: &Way) -> String {
    format!("{}, for {}", way.why, show_ms(way.for_ms / 1000 * 1000))
}

impl<'a> Facts<'a> {
    /// What `from` says of its way to `to`.
    fn way(&self, from: &NodeName, to: &NodeName) -> Option<&'a Way> {
        let ways = self.nodes.get(from)?.as_ref().ok()?;
        ways.iter().find(|way| way.node == *to)
    }

    fn reaches(&self, from: &NodeName, to: &NodeName) -> bool {
        self.way(from, to).is_some_and(|way| way.reached)
    }

    /// Who reaches a node, of those that say anything.
    fn reached_by(&self, node: &NodeName) -> Vec<&'a NodeName> {
        let all = self.nodes.keys().copied();
        all.filter(|from| self.reaches(from, node)).collect()
    }

    /// The health of a node that does not answer here, and why.
    fn silent(&self, node: &NodeName, why: &str) -> (Health, String) {
        let Some(present) = self.present else {
            let unknown = "whether it is announced in the registry is not known";
            let by = self.reached_by(node);
            return match by.is_empty() {
                true => (Health::Offline, format!("{why}; {unknown}")),
                false => (
                    Health::Unreachable,
                    format!("{why}; it runs: {} it; {unknown}", reach(&by)),
                ),
            };
        };
        let announced = present.names.contains(&node.0);
        if present.certain && !announced {
            // Whatever was reached some seconds ago.
            return (Health::Offline, why.into());
        }
        let by = self.reached_by(node);
        let mut signs = Vec::new();
        if !by.is_empty() {
            signs.push(format!("{} it", reach(&by)));
        }
        if announced {
            signs.push("its lease in the registry is held".into());
        }
        if signs.is_empty() {
            return (Health::Offline, why.into());
        }
        // A lease in etcd outlives its process for a while.
        let runs = match !by.is_empty() || present.certain {
            true => "it runs",
            false => "it may run",
        };
        let mut text = format!("{why}; {runs}: {}", signs.join(", "));
        let others = self.nodes.keys().filter(|from| **from != self.here);
        let not_by: Vec<String> = others
            .filter_map(|from| {
                let way = self.way(from, node).filter(|way| !way.reached)?;
                Some(format!("{from} does not reach it ({})", because(way)))
            })
            .collect();
        if !not_by.is_empty() {
            text += &format!("; {}", not_by.join(", "));
        }
        (Health::Unreachable, text)
    }

    /// What there is to say about the ways between two nodes that answer.
    fn between(&self, a: &'a NodeName, b: &'a NodeName) -> Option<String> {
        let one_way = |blind: &NodeName, other: &NodeName, way: &Way| {
            let seen = self.way(other, blind).map(|w| w.reached);
            let cut = format!("{blind} does not reach {other} ({})", because(way));
            match seen {
                Some(true) => {
                    format!("{other} reaches {blind}, {cut}: the way is cut in one direction")
                }
                _ => cut,
            }
        };
        let lost = |from, to| self.way(from, to).filter(|way| !way.reached);
        match (lost(a, b), lost(b, a)) {
            (None, None) => None,
            (Some(way), None) => Some(one_way(a, b, way)),
            (None, Some(way)) => Some(one_way(b, a, way)),
            (Some(way), Some(_)) => {
                let mut text = format!("{a} and {b} do not reach each other ({})", because(way));
                let heard = |by, of| self.way(by, of).is_some_and(|way| way.heard);
                let half = match (heard(a, b), heard(b, a)) {
                    (true, false) => Some((b, a)),
                    (false, true) => Some((a, b)),
                    _ => None,
                };
                if let Some((from, to)) = half {
                    text += &format!(
                        ": what {from} sends arrives at {to}, what {to} sends does not arrive at {from}; \
                         the way is cut in one direction"
                    );
                }
                let all = self.nodes.keys().copied();
                let both: Vec<&NodeName> = all
                    .filter(|n| self.reaches(n, a) && self.reaches(n, b))
                    .collect();
                if !both.is_empty() {
                    text += &format!("; {} both", reach(&both));
                }
                Some(text)
            }
        }
    }
}

/// How the nodes are.
pub fn assess(facts: &Facts<'_>) -> Sight {
    let mut sight = Sight::default();
    for (name, answer) in &facts.nodes {
        let health = match answer {
            Ok(_) => (Health::Online, String::new()),
            Err(why) => facts.silent(name, why),
        };
        sight.nodes.insert((*name).clone(), health);
    }
    let answering = facts.nodes.iter().filter(|(_, answer)| answer.is_ok());
    let names: Vec<&NodeName> = answering.map(|(name, _)| *name).collect();
    for (i, a) in names.iter().enumerate() {
        for b in &names[i + 1..] {
            if let Some(text) = facts.between(a, b) {
                let between = [(*a).clone(), (*b).clone()];
                sight.cuts.push(Cut { between, text });
            }
        }
    }
    sight
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fixture::node;

    /// `n2+ n3- n4<`: the way to n2 is open and those to n3 and n4 are cut, for 12 s; n4 is heard.
    fn ways(text: &str) -> Vec<Way> {
        let way = |word: &str| {
            let (name, sign) = word.split_at(word.len() - 1);
            Way {
                node: node(name),
                reached: sign == "+",
                for_ms: 12_345,
                why: if sign == "+" { "" } else { "late" }.into(),
                heard: sign == "<",
            }
        };
        text.split_whitespace().map(way).collect()
    }

    /// As n1 sees n1, n2 and n3: each one's ways, or `!` for one that does not answer.
    fn seen(nodes: [&str; 3], present: Option<(&str, bool)>) -> Sight {
        let names = ["n1", "n2", "n3"].map(node);
        let ways = nodes.map(ways_of);
        let present = present.map(|(names, certain)| Present {
            names: names.split_whitespace().map(String::from).collect(),
            certain,
        });
        let answer = |ways: &'_ Option<Vec<Way>>| match ways {
            Some(ways) => Ok(ways.clone()),
            None => Err("refused".to_string()),
        };
        let answers = ways.each_ref().map(answer);
        let nodes = names.iter().zip(&answers).map(|(name, answer)| {
            let answer = answer.as_ref().map(Vec::as_slice);
            (name, answer.map_err(Clone::clone))
        });
        assess(&Facts {
            here: &names[0],
            nodes: nodes.collect(),
            present: present.as_ref(),
        })
    }

    fn ways_of(text: &str) -> Option<Vec<Way>> {
        (text != "!").then(|| ways(text))
    }

    #[test]
    fn a_node_that_does_not_answer_is_offline_unless_something_says_that_it_runs() {
        // (what n1, n2 and n3 say; who is announced and whether that is certain; n2's health and why)
        let unknown = "whether it is announced in the registry is not known";
        for (nodes, present, health, why) in [
            (["", "", ""], None, Health::Online, ""),
            (
                ["n2-", "!", ""],
                Some(("n1 n3", false)),
                Health::Offline,
                "refused",
            ),
            (
                ["n2-", "!", ""],
                Some(("n1 n2 n3", false)),
                Health::Unreachable,
                "refused; it may run: its lease in the registry is held",
            ),
            (
                ["n2-", "!", "n2-"],
                Some(("n1 n2 n3", true)),
                Health::Unreachable,
                "refused; it runs: its lease in the registry is held; n3 does not reach it (late, for 12s)",
            ),
            (
                ["n2-", "!", "n2+"],
                Some(("n1 n3", false)),
                Health::Unreachable,
                "refused; it runs: n3 reaches it",
            ),
            (
                ["n2+", "!", "n2+"],
                Some(("n2", false)),
                Health::Unreachable,
                "refused; it runs: n1 and n3 reach it, its lease in the registry is held",
            ),
            // Reached some seconds ago, and its process has ended since.
            (
                ["n2+", "!", "n2+"],
                Some(("n1 n3", true)),
                Health::Offline,
                "refused",
            ),
            (
                ["", "!", "n2-"],
                None,
                Health::Offline,
                &format!("refused; {unknown}"),
            ),
            (
                ["", "!", "n2+"],
                None,
                Health::Unreachable,
                &format!("refused; it runs: n3 reaches it; {unknown}"),
            ),
            // One that answers is online, whatever others say.
            (["n2-", "", "n2-"], Some(("", true)), Health::Online, ""),
        ] {
            let sight = seen(nodes, present);
            let expected = (health, why.to_string());
            assert_eq!(sight.nodes[&node("n2")], expected, "{nodes:?} {present:?}");
            assert_eq!(sight.nodes[&node("n1")].0, Health::Online);
        }
    }

    #[test]
    fn cuts_between_nodes_that_answer_are_named_with_their_direction() {
        // (what n1, n2 and n3 say, the sentences)
        let table: [([&str; 3], &[&str]); 10] = [
            (["n2+ n3+", "n1+ n3+", "n1+ n2+"], &[]),
            // Nothing known yet, or said by none of an older version.
            (["", "", ""], &[]),
            (
                ["n2+ n3+", "n1+ n3+", "n1+ n2-"],
                &[
                    "n2 reaches n3, n3 does not reach n2 (late, for 12s): the way is cut in one direction",
                ],
            ),
            (
                ["n2- n3+", "n1+ n3+", "n1+ n2+"],
                &[
                    "n2 reaches n1, n1 does not reach n2 (late, for 12s): the way is cut in one direction",
                ],
            ),
            (
                ["n2+ n3+", "n1+ n3-", "n1+ n2-"],
                &["n2 and n3 do not reach each other (late, for 12s); n1 reaches both"],
            ),
            (
                ["n2+ n3+", "n1+ n3<", "n1+ n2-"],
                &[
                    "n2 and n3 do not reach each other (late, for 12s): what n3 sends arrives at n2, what n2 sends \
                     does not arrive at n3; the way is cut in one direction; n1 reaches both",
                ],
            ),
            // Both are heard, each now and then: that is no direction.
            (
                ["n2+ n3+", "n1+ n3<", "n1+ n2<"],
                &["n2 and n3 do not reach each other (late, for 12s); n1 reaches both"],
            ),
            (
                ["n2- n3-", "n1- n3+", "n1- n2+"],
                &[
                    "n1 and n2 do not reach each other (late, for 12s)",
                    "n1 and n3 do not reach each other (late, for 12s)",
                ],
            ),
            (
                ["n2+ n3+", "n3-", ""],
                &["n2 does not reach n3 (late, for 12s)"],
            ),
            // A node that does not answer has its own line.
            (["n2- n3+", "!", "n1+ n2-"], &[]),
        ];
        for (nodes, expected) in table {
            let sight = seen(nodes, Some(("", false)));
            let texts: Vec<&str> = sight.cuts.iter().map(|cut| cut.text.as_str()).collect();
            assert_eq!(texts, expected, "{nodes:?}");
        }
        let sight = seen(["n2+ n3+", "n1+ n3+", "n1+ n2-"], None);
        assert_eq!(sight.cuts_of(&node("n1")), Vec::<String>::new());
        assert_eq!(sight.cuts_of(&node("n3")).len(), 1);
    }

    #[test]
    fn who_reaches_is_listed_as_people_do() {
        let names = ["n1", "n2", "n3"].map(node);
        let all: Vec<&NodeName> = names.iter().collect();
        assert_eq!(reach(&all[..1]), "n1 reaches");
        assert_eq!(reach(&all[..2]), "n1 and n2 reach");
        assert_eq!(reach(&all), "n1, n2 and n3 reach");
    }
}
