//! Where a new volume's copies go: a pure function from what the nodes say to a choice, or to why there is none.

use std::collections::BTreeMap;
use std::fmt;

use super::labels::{self, PREFIX};
use super::model::Labels;
use crate::replication::ids::NodeName;

/// Bytes a node must have free to be given a copy: superblock, log and bitmaps of the largest volume with room to
/// spare. Volumes are thin, so their size is not counted.
pub const FREE_MIN: u64 = 64 << 20;

/// One node as placement sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its name.
    pub name: NodeName,
    /// Free bytes, or why the node does not answer or is not reached.
    pub free: Result<u64, String>,
    /// Copies that it has or was promised.
    pub copies: usize,
    /// Its labels.
    pub labels: Labels,
    /// People closed it to new copies.
    pub cordoned: bool,
    /// It is being emptied.
    pub draining: bool,
}

/// What is to be placed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Copies: replicas + 1.
    pub copies: usize,
    /// The node that must hold the master.
    pub master: Option<NodeName>,
    /// Whether another node will do for the master if that one cannot (a hint, not an order).
    pub master_is_hint: bool,
    /// Nodes with different values of this label are preferred.
    pub topology_key: Option<String>,
    /// The nodes that have a copy of the volume.
    pub beside: Vec<Beside>,
}

/// A node that has a copy of the volume already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beside {
    /// Which.
    pub node: NodeName,
    /// The copy stays: nodes with the same value of the topology label are not preferred.
    pub stays: bool,
}

/// A choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// One node a copy, the master's first.
    pub nodes: Vec<NodeName>,
    /// What could not be had although it was wished for, one sentence each.
    pub remarks: Vec<String>,
}

/// Why there is no choice.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct NoPlace {
    /// Copies wanted.
    pub wanted: usize,
    /// They would be added to others.
    pub more: bool,
    /// Nodes that would take one.
    pub fit: Vec<NodeName>,
    /// Why each other node was refused.
    pub refused: Vec<(NodeName, String)>,
    /// Why the master's node was refused, where that is what failed.
    pub master: Option<NodeName>,
}

impl fmt::Display for NoPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.master {
            Some(master) => write!(f, "the master cannot be placed on {master}")?,
            None => {
                let more = if self.more { "more " } else { "" };
                match self.wanted {
                    1 => write!(f, "1 {more}copy needs a node")?,
                    n => write!(f, "{n} {more}copies need {n} nodes")?,
                }
                write!(f, " and {} can take one", self.fit.len())?;
                if !self.fit.is_empty() {
                    let names: Vec<String> = self.fit.iter().map(ToString::to_string).collect();
                    write!(f, " ({})", names.join(", "))?;
                }
            }
        }
        for (node, why) in &self.refused {
            write!(f, "; {node}: {why}")?;
        }
        Ok(())
    }
}

/// Nodes whose free space is short of the most by less than this part are equals: it changes by that much while one looks,
/// and of machines that are alike the same one would be chosen again and again.
const ALIKE_PART: u64 = 64;

/// Chooses a node for each copy: never two on one, reachable, not cordoned or drained, not compute-only, not full; the most
/// free space first, unused values of the topology label before that. Of equal nodes the one with the fewest copies is
/// taken, of these the first by name, so the same state gives the same choice.
pub fn place(wanted: &Wanted, candidates: &[Candidate]) -> Result<Placement, NoPlace> {
    let mut fit: Vec<(&Candidate, u64)> = Vec::new();
    let mut refused = Vec::new();
    for candidate in candidates {
        let has_one = wanted.beside.iter().any(|b| b.node == candidate.name);
        let fitness = match has_one {
            true => Err("it has a copy of the volume".into()),
            false => fitness(candidate),
        };
        match fitness {
            Ok(free) => fit.push((candidate, free)),
            Err(why) => refused.push((candidate.name.clone(), why)),
        }
    }
    let fit = by_preference(fit);
    let no_place = |master: Option<NodeName>, refused| NoPlace {
        wanted: wanted.copies,
        more: !wanted.beside.is_empty(),
        fit: fit.iter().map(|c| c.name.clone()).collect(),
        refused,
        master,
    };

    let mut placement = Placement {
        nodes: Vec::new(),
        remarks: Vec::new(),
    };
    let mut spread = Spread::new(wanted.topology_key.as_deref());
    for beside in wanted.beside.iter().filter(|b| b.stays) {
        if let Some(candidate) = candidates.iter().find(|c| c.name == beside.node) {
            spread.count(candidate);
        }
    }
    let mut rest = fit.clone();
    if let Some(master) = &wanted.master {
        match rest.iter().position(|c| c.name == *master) {
            Some(i) => spread.take(rest.remove(i), &mut placement.nodes),
            None => {
                let why = refused
                    .iter()
                    .find(|(n, _)| n == master)
                    .map_or("it is not a node of this cluster", |(_, why)| why)
                    .to_string();
                if !wanted.master_is_hint {
                    return Err(no_place(Some(master.clone()), vec![(master.clone(), why)]));
                }
                placement
                    .remarks
                    .push(format!("the master is not on {master}: {why}"));
            }
        }
    }
    if placement.nodes.len() + rest.len() < wanted.copies {
        return Err(no_place(None, refused));
    }
    while placement.nodes.len() < wanted.copies {
        // `rest` is in order of preference and min_by_key keeps the first of equals.
        let Some(i) = (0..rest.len()).min_by_key(|i| spread.used(rest[*i])) else {
            return Err(no_place(None, refused));
        };
        let chosen = rest.remove(i);
        if spread.used(chosen) > 0 {
            placement.remarks.push(format!(
                "{} shares its {} with another copy: no node with another value can take one",
                chosen.name,
                wanted.topology_key.as_deref().unwrap_or_default()
            ));
        }
        spread.take(chosen, &mut placement.nodes);
    }
    Ok(placement)
}

/// The most free space first; of those that are alike in that the fewest copies first, then by name.
fn by_preference(mut fit: Vec<(&Candidate, u64)>) -> Vec<&Candidate> {
    let mut sorted = Vec::new();
    while let Some(most) = fit.iter().map(|(_, free)| *free).max() {
        let alike = |free: u64| free >= most - most / ALIKE_PART;
        let best = (0..fit.len())
            .filter(|i| alike(fit[*i].1))
            .min_by_key(|i| (fit[*i].0.copies, &fit[*i].0.name));
        let Some(best) = best else { break };
        sorted.push(fit.swap_remove(best).0);
    }
    sorted
}

/// Its free bytes, or why it takes no copy.
pub fn fitness(candidate: &Candidate) -> Result<u64, String> {
    let free = candidate.free.clone()?;
    if candidate.cordoned {
        return Err("it is cordoned".into());
    }
    if candidate.draining {
        return Err("it is drained".into());
    }
    if is_compute_only(&candidate.labels) {
        return Err("it is compute-only".into());
    }
    if free < FREE_MIN {
        return Err(format!(
            "its disk is full ({} free)",
            super::units::show_size(free)
        ));
    }
    Ok(free)
}

/// Whether a node's labels say that it holds no copies.
pub fn is_compute_only(node: &Labels) -> bool {
    node.get(&format!("{PREFIX}computeonly"))
        .is_some_and(|v| labels::is_true(v))
}

/// How often each value of the topology label was taken.
struct Spread<'a> {
    key: Option<&'a str>,
    taken: BTreeMap<String, usize>,
}

impl<'a> Spread<'a> {
    fn new(key: Option<&'a str>) -> Self {
        Self {
            key,
            taken: BTreeMap::new(),
        }
    }

    fn value(&self, candidate: &Candidate) -> Option<String> {
        candidate.labels.get(self.key?).cloned()
    }

    /// A node without the label counts as a place of its own.
    fn used(&self, candidate: &Candidate) -> usize {
        self.value(candidate)
            .and_then(|v| self.taken.get(&v).copied())
            .unwrap_or(0)
    }

    fn count(&mut self, candidate: &Candidate) {
        if let Some(value) = self.value(candidate) {
            *self.taken.entry(value).or_default() += 1;
        }
    }

    fn take(&mut self, candidate: &Candidate, nodes: &mut Vec<NodeName>) {
        self.count(candidate);
        nodes.push(candidate.name.clone());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const G: u64 = 1 << 30;

    fn node(name: &str, free: u64, labels: &[(&str, &str)]) -> Candidate {
        Candidate {
            name: NodeName(name.into()),
            free: Ok(free),
            copies: 0,
            labels: labels
                .iter()
                .map(|(k, v)| (k.to_string(), v.to_string()))
                .collect(),
            cordoned: false,
            draining: false,
        }
    }

    fn dead(name: &str) -> Candidate {
        Candidate {
            free: Err("it does not answer".into()),
            ..node(name, 0, &[])
        }
    }

    fn wanted(copies: usize) -> Wanted {
        Wanted {
            copies,
            ..Wanted::default()
        }
    }

    fn names(result: Result<Placement, NoPlace>) -> String {
        match result {
            Ok(p) => p
                .nodes
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(","),
            Err(e) => format!("! {e}"),
        }
    }

    #[test]
    fn copies_go_where_the_table_says() {
        let nodes = [
            node("a", 10 * G, &[("zone", "x")]),
            node("b", 30 * G, &[("zone", "x")]),
            node("c", 20 * G, &[("zone", "y")]),
            node("d", 30 * G, &[("zone", "x")]),
        ];
        let zoned = |copies| Wanted {
            topology_key: Some("zone".into()),
            ..wanted(copies)
        };
        let mastered = |copies, master: &str| Wanted {
            master: Some(NodeName(master.into())),
            ..wanted(copies)
        };
        for (what, expected) in [
            (wanted(1), "b"),
            (wanted(2), "b,d"),
            (wanted(4), "b,d,c,a"),
            (zoned(2), "b,c"),
            (zoned(3), "b,c,d"),
            (mastered(2, "a"), "a,b"),
            (mastered(1, "c"), "c"),
            (
                wanted(5),
                "! 5 copies need 5 nodes and 4 can take one (b, d, c, a)",
            ),
            (
                mastered(1, "z"),
                "! the master cannot be placed on z; z: it is not a node of this cluster",
            ),
        ] {
            assert_eq!(names(place(&what, &nodes)), expected, "{what:?}");
        }
    }

    #[test]
    fn of_nodes_that_are_alike_the_one_with_the_fewest_copies_is_taken() {
        let with = |name, free, copies| Candidate {
            copies,
            ..node(name, free, &[])
        };
        let nodes = [
            with("a", 64 * G, 9),
            with("b", 63 * G, 7),
            with("c", 63 * G + 1, 7),
            // Less than the others by more than a little.
            with("d", 62 * G, 0),
        ];
        assert_eq!(names(place(&wanted(4), &nodes)), "b,c,a,d");
        // Copies that are placed one after the other by one look at the nodes spread over those that are alike.
        let mut nodes = [
            with("a", 64 * G, 0),
            with("b", 64 * G, 2),
            with("c", 64 * G, 0),
        ];
        for _ in 0..10 {
            let chosen = names(place(&wanted(1), &nodes));
            let node = nodes.iter_mut().find(|n| n.name.0 == chosen).unwrap();
            node.copies += 1;
        }
        assert_eq!(nodes.map(|n| n.copies), [4, 4, 4]);
    }

    #[test]
    fn each_refused_node_is_named_with_its_reason() {
        let nodes = [
            node("a", 10 * G, &[]),
            dead("b"),
            node("c", G, &[("lockstep.io/computeonly", "true")]),
            node("d", 1, &[]),
            node("e", G, &[("lockstep.io/computeonly", "false")]),
            Candidate {
                cordoned: true,
                ..node("f", 99 * G, &[])
            },
            Candidate {
                draining: true,
                ..node("g", 99 * G, &[])
            },
        ];
        assert_eq!(names(place(&wanted(2), &nodes)), "a,e");
        assert_eq!(
            names(place(&wanted(3), &nodes)),
            "! 3 copies need 3 nodes and 2 can take one (a, e); b: it does not answer; c: it is compute-only; \
             d: its disk is full (1 B free); f: it is cordoned; g: it is drained"
        );
        let mastered = Wanted {
            master: Some(NodeName("f".into())),
            ..wanted(1)
        };
        assert_eq!(
            names(place(&mastered, &nodes)),
            "! the master cannot be placed on f; f: it is cordoned"
        );
        let hinted = Wanted {
            master_is_hint: true,
            ..mastered
        };
        let placement = place(&hinted, &nodes).unwrap();
        assert_eq!(placement.nodes, [NodeName("a".into())]);
        assert_eq!(
            placement.remarks,
            ["the master is not on f: it is cordoned"]
        );
    }

    #[test]
    fn a_copy_that_is_added_goes_beside_the_others() {
        let nodes = [
            node("a", 30 * G, &[("zone", "x")]),
            node("b", 20 * G, &[("zone", "x")]),
            node("c", 10 * G, &[("zone", "y")]),
            node("d", 5 * G, &[("zone", "y")]),
        ];
        let beside = |names: &[(&str, bool)], copies| Wanted {
            topology_key: Some("zone".into()),
            beside: names
                .iter()
                .map(|(name, stays)| Beside {
                    node: NodeName((*name).into()),
                    stays: *stays,
                })
                .collect(),
            ..wanted(copies)
        };
        for (what, expected) in [
            (beside(&[("a", true)], 1), "c"),
            (beside(&[("c", true)], 1), "a"),
            // The one that goes leaves its zone free, and its node taken.
            (beside(&[("a", true), ("c", false)], 1), "d"),
            (beside(&[("a", false), ("c", true)], 1), "b"),
            (beside(&[("a", true), ("c", true)], 2), "b,d"),
            (
                beside(&[("a", true), ("b", true), ("c", true)], 2),
                "! 2 more copies need 2 nodes and 1 can take one (d); a: it has a copy of the volume; \
                 b: it has a copy of the volume; c: it has a copy of the volume",
            ),
        ] {
            assert_eq!(names(place(&what, &nodes)), expected, "{what:?}");
        }
        let nodes = [node("a", G, &[]), dead("b")];
        assert_eq!(
            names(place(&beside(&[("a", true)], 1), &nodes)),
            "! 1 more copy needs a node and 0 can take one; a: it has a copy of the volume; b: it does not answer"
        );
    }

    #[test]
    fn a_hint_gives_way_and_says_so() {
        let hint = Wanted {
            master: Some(NodeName("b".into())),
            master_is_hint: true,
            ..wanted(1)
        };
        let placement = place(&hint, &[node("a", G, &[]), dead("b")]).unwrap();
        assert_eq!(placement.nodes, [NodeName("a".into())]);
        assert!(placement.remarks[0].contains("it does not answer"));
    }

    /// Nodes n0, n1, … each with some reason to be refused or none.
    fn cluster() -> impl Strategy<Value = Vec<Candidate>> {
        let one = (0..6u64, 0..8u8, 0..4u8);
        prop::collection::vec(one, 0..8).prop_map(|nodes| {
            nodes
                .into_iter()
                .enumerate()
                .map(|(i, (free, state, zone))| {
                    let zone = ["", "x", "y", "z"][usize::from(zone)];
                    let labels: &[(&str, &str)] = match (state, zone) {
                        (0, _) => &[("lockstep.io/computeonly", "")],
                        (_, "") => &[],
                        _ => &[("zone", zone)],
                    };
                    let name = format!("n{i}");
                    let free = match state {
                        1 => Err("it does not answer".into()),
                        _ => Ok(free * FREE_MIN / 2),
                    };
                    Candidate {
                        free,
                        cordoned: state == 2,
                        draining: state == 3,
                        ..node(&name, 0, labels)
                    }
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn a_choice_keeps_all_rules_and_depends_on_nothing_but_the_state(
            nodes in cluster(),
            copies in 1..6usize,
            master in prop::option::of(0..9usize),
            hint in any::<bool>(),
            beside in prop::collection::btree_map(0..8usize, any::<bool>(), 0..3),
            spread in any::<bool>(),
            turn in 0..8usize,
        ) {
            let wanted = Wanted {
                copies,
                master: master.map(|i| NodeName(format!("n{i}"))),
                master_is_hint: hint,
                topology_key: spread.then(|| "zone".into()),
                beside: beside
                    .iter()
                    .map(|(i, stays)| Beside { node: NodeName(format!("n{i}")), stays: *stays })
                    .collect(),
            };
            let result = place(&wanted, &nodes);
            let mut turned = nodes.clone();
            turned.rotate_left(turn % nodes.len().max(1));
            let again = place(&wanted, &turned);
            prop_assert_eq!(again.as_ref().ok(), result.as_ref().ok());
            let takes = |c: &&Candidate| {
                fitness(c).is_ok() && !wanted.beside.iter().any(|b| b.node == c.name)
            };
            let fit: Vec<&Candidate> = nodes.iter().filter(takes).collect();
            match result {
                Ok(placement) => {
                    prop_assert_eq!(placement.nodes.len(), copies);
                    let mut distinct = placement.nodes.clone();
                    distinct.sort();
                    distinct.dedup();
                    prop_assert_eq!(distinct.len(), copies, "two copies on a node");
                    prop_assert!(placement.nodes.iter().all(|n| fit.iter().any(|c| c.name == *n)));
                    let master_fits = wanted.master.as_ref().filter(|m| fit.iter().any(|c| c.name == **m));
                    if let Some(master) = master_fits {
                        prop_assert_eq!(&placement.nodes[0], master);
                    } else {
                        prop_assert!(wanted.master.is_none() || hint);
                    }
                    if !spread && master_fits.is_none() {
                        // Nobody with more space was passed over.
                        let least = |n: &NodeName| fit.iter().find(|c| c.name == *n).unwrap().free.clone();
                        let worst = placement.nodes.iter().map(|n| least(n).unwrap()).min();
                        let left = fit.iter().filter(|c| !placement.nodes.contains(&c.name));
                        prop_assert!(left.map(|c| c.free.clone().unwrap()).max() <= worst);
                    }
                }
                Err(no) if no.master.is_some() => prop_assert!(!hint),
                Err(no) => {
                    prop_assert!(fit.len() < copies, "{no}");
                    // Each node either fits or is named with its reason.
                    prop_assert_eq!(no.fit.len() + no.refused.len(), nodes.len());
                    prop_assert!(no.refused.iter().all(|(_, why)| !why.is_empty()));
                }
            }
        }
    }
}
