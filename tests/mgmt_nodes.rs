//! Nodes: cordoned, labelled, emptied, removed; and a cluster in maintenance. The attachment's part is played by the
//! test; `cluster_drain` has the real one.

mod mgmt_support;

use std::process::{Child, Command, Stdio};

use hyper::Method;
use lockstep::replication::ids::{CopyId, NodeName};
use lockstep::replication::record::{CopyStatus, Record};
use lockstep::replication::throttle::SYNCS_MAX;
use mgmt_support::{Lab, Node, eventually};
use serde_json::{Value, json};

fn command(node: &Node, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    command
        .env_remove("RUST_LOG")
        .env(
            "LOCKSTEP_HOST",
            format!("unix:{}", node.run_dir.join("api.sock").display()),
        )
        .args(line.split_whitespace())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn on(node: &Node, line: &str) -> (i32, String, String) {
    ended(command(node, line).spawn().unwrap())
}

fn ended(child: Child) -> (i32, String, String) {
    let done = child.wait_with_output().unwrap();
    (
        done.status.code().unwrap(),
        String::from_utf8(done.stdout).unwrap(),
        String::from_utf8(done.stderr).unwrap(),
    )
}

fn ok(node: &Node, line: &str) -> String {
    let (code, out, err) = on(node, line);
    assert_eq!(code, 0, "{line}: {err}");
    out
}

#[track_caller]
fn refused(node: &Node, line: &str, expected: i32, parts: &[&str]) {
    let (code, out, err) = on(node, line);
    assert_eq!((code, out.as_str()), (expected, ""), "{line}: {err}");
    for part in parts {
        assert!(err.contains(part), "{line}: no '{part}' in {err}");
    }
}

fn row(node: &Node, name: &str) -> String {
    let table = ok(node, "node ls");
    let row = table
        .lines()
        .find(|l| l.split_whitespace().next() == Some(name));
    row.unwrap_or_else(|| panic!("{name} in {table}")).into()
}

fn attach(node: &Node, name: &str, to: &str) {
    let path = format!("/api/v1/volumes/default/{name}/attach");
    let (status, body) = node.post(&path, json!({"node": to}));
    assert_eq!(status, 200, "{body}");
}

fn entry<'a>(
    record: &'a Record,
    node: &str,
) -> Option<&'a lockstep::replication::record::CopyEntry> {
    record.copy_on(&NodeName(node.into()))
}

/// The copy on its way to `to`, once its node made it.
fn arriving(lab: &Lab, node: &Node, volume: &str, to: &str) -> CopyId {
    eventually("a copy is made for the move", || {
        let record = node.record(volume);
        let copy = entry(&record, to).filter(|c| c.status == CopyStatus::Missing)?;
        (lab.copy_on(to, record.volume_id) == Some(copy.copy_id)).then_some(copy.copy_id)
    })
}

#[test]
fn a_cordoned_node_gets_no_copies_and_stays_so_over_a_restart() {
    let lab = Lab::new();
    let [n1, n2, n3]: [Node; 3] = lab.nodes();
    ok(&n1, "volume create before --size 1GiB --replicas 2");
    assert_eq!(ok(&n1, "node cordon n2"), "n2\n");
    assert!(
        row(&n3, "n2").contains("false (cordoned)"),
        "{}",
        row(&n3, "n2")
    );
    refused(
        &n3,
        "volume create a --size 1GiB --replicas 2",
        11,
        &[
            "3 copies need 3 nodes and 2 can take one (n1, n3)",
            "n2: it is cordoned",
        ],
    );
    refused(
        &n3,
        "volume create a --size 1GiB --master n2",
        11,
        &["the master cannot be placed on n2", "it is cordoned"],
    );
    // A hint gives way.
    let (_, out, err) = on(
        &n3,
        "volume create a --size 1GiB --label lockstep.io/hint.master=n2",
    );
    assert_eq!(out, "default/a\n");
    assert!(
        err.contains("the master is not on n2: it is cordoned"),
        "{err}"
    );
    refused(
        &n3,
        "volume promote before --node n2",
        11,
        &["node n2 is cordoned", "lockstep node uncordon n2"],
    );
    // Its process starts anew: what people decided stands.
    n2.stop();
    let n2 = lab.node("n2");
    assert!(row(&n1, "n2").contains("cordoned"));
    ok(&n2, "node uncordon n2");
    ok(&n3, "volume create b --size 1GiB --replicas 2");
    refused(&n1, "node cordon n9", 8, &["node ls"]);
    refused(&n1, "node cordon a/b", 10, &["letters"]);
}

#[test]
fn labels_of_a_node_outlive_its_process_and_steer_placement() {
    let lab = Lab::new();
    let mut config = lab.config("n1");
    config.labels.insert("zone".into(), "a".into());
    config.labels.insert("rack".into(), "1".into());
    let n1 = lab.start(config.clone()).unwrap();
    let [n2, n3] = ["n2", "n3"].map(|n| lab.node(n));
    for (line, parts) in [
        ("node label n1 zone", &["k- to take it away"][..]),
        (
            "node label n1 lockstep.io/compute=1",
            &["lockstep.io/computeonly"],
        ),
        (
            "node label n1 lockstep.io/replicas=1",
            &["on volumes, not on nodes"],
        ),
        ("node label n1 zone=b zone-", &["both set and taken away"]),
    ] {
        refused(&n2, line, 10, parts);
    }
    refused(&n2, "node label n1", 2, &["K=V"]);
    ok(&n2, "node label n1 zone=b rack- disk=ssd");
    ok(&n2, "node label n2 zone=b");
    ok(&n2, "node label n3 zone=c");
    ok(&n2, "node label n2 storageos.com/computeonly=no");
    n1.stop();
    let n1 = lab.start(config).unwrap();
    let labels = n1.get("/api/v1/nodes/n1")["labels"].clone();
    assert_eq!(labels, json!({"zone": "b", "disk": "ssd"}));

    // Spread over the label's values; where there are too few, it is said.
    ok(
        &n1,
        "volume create v --size 1GiB --replicas 1 --master n1 --label lockstep.io/topology-key=zone",
    );
    let record = n1.record("v");
    assert!(entry(&record, "n3").is_some(), "n2 is in the zone of n1");
    assert_eq!(n1.volume("v")["remarks"], json!([]));
    let (_, _, err) = on(
        &n1,
        "volume create w --size 1GiB --replicas 2 --label lockstep.io/topology-key=zone",
    );
    assert!(err.contains("shares its zone with another copy"), "{err}");
    assert_eq!(
        n1.volume("w")["remarks"],
        json!(["copies share zone=b: n1, n2"])
    );
    assert!(ok(&n1, "volume inspect w").contains("copies share zone=b: n1, n2"));

    ok(&n2, "node label n2 lockstep.io/computeonly=true");
    assert!(row(&n1, "n2").contains("false (compute-only)"));
    refused(
        &n2,
        "volume create x --size 1GiB --replicas 2",
        11,
        &["n2: it is compute-only"],
    );
    drop(n3);
}

#[test]
fn a_dead_node_is_removed_when_nothing_needs_it() {
    let lab = Lab::new();
    let [n1, n2, n3]: [Node; 3] = lab.nodes();
    ok(
        &n1,
        "volume create vm1 --size 1GiB --replicas 1 --master n1",
    );
    let on_n3 = entry(&n1.record("vm1"), "n3").is_some();
    let (dead, other, dead_name) = match on_n3 {
        true => (n3, n2, "n3"),
        false => (n2, n3, "n2"),
    };
    ok(
        &n1,
        &format!("volume create lone --size 1GiB --master {dead_name}"),
    );
    refused(
        &n1,
        &format!("node rm {dead_name}"),
        11,
        &["is not dead", "lockstep node drain"],
    );
    refused(&n1, "node rm n1", 11, &["answers this command"]);
    refused(&n1, "node rm n9", 8, &["node ls"]);
    attach(&n1, "lone", dead_name);
    // A volume that was removed while its node was away: nobody waits for it any more afterwards.
    ok(
        &n1,
        &format!("volume create gone --size 1GiB --master {dead_name}"),
    );
    dead.crash();
    ok(&n1, "volume rm gone");
    refused(
        &n1,
        &format!("node rm {dead_name}"),
        11,
        &[
            "where default/lone should be served",
            "lockstep volume detach default/lone --force",
        ],
    );
    ok(&n1, "volume detach lone --force");
    refused(
        &n1,
        &format!("node rm {dead_name}"),
        11,
        &[
            "holds the only copy of default/lone",
            "lockstep volume rm default/lone",
        ],
    );
    ok(&n1, "volume rm lone");
    refused(
        &n1,
        &format!("node rm {dead_name}"),
        11,
        &[
            "still holds copies of default/vm1",
            &format!("lockstep node drain {dead_name}"),
        ],
    );
    n1.edit("vm1", |r| {
        let at = r.copies.iter().position(|c| c.node.0 == dead_name).unwrap();
        r.copies[at].status = CopyStatus::Removed;
        r.replicas_wanted = 0;
    });
    assert_eq!(
        ok(&n1, &format!("node rm {dead_name}")),
        format!("{dead_name}\n")
    );
    assert_eq!(ok(&n1, "node ls").lines().count(), 3);
    let left = n1.store.snapshot().unwrap().removed;
    let waits = left.values().flat_map(|(t, _)| &t.copies);
    assert!(
        !waits.into_iter().any(|(n, _)| n.0 == dead_name),
        "{left:?}"
    );
    // It may come back under its name, as a new node.
    let back = lab.node(dead_name);
    assert_eq!(ok(&other, "node ls").lines().count(), 4);
    drop(back);
}

#[test]
fn a_node_that_is_removed_while_it_lives_unseen_gives_up_its_name() {
    let lab = Lab::new();
    let [n1, n2]: [Node; 2] = lab.nodes();
    // As if the other one could not be reached from here: removed under its feet.
    let name = NodeName("n2".into());
    eventually(
        "it is removed, whatever it says of itself meanwhile",
        || {
            let (_, revision) = n1.store.node(&name).unwrap().unwrap();
            n1.store.remove_node(&name, revision).ok()
        },
    );
    let why = eventually("it notices", || n2.fatal());
    assert!(why.contains("no longer in the registry"), "{why}");
}

#[test]
fn a_drain_moves_each_copy_a_few_at_a_time_and_is_waited_for() {
    let lab = Lab::new();
    let [n1, _n2, n3, _n4]: [Node; 4] = lab.nodes();
    // One more than may be on their way at once.
    let moved = ["a", "b", "c", "g", "h"];
    assert_eq!(moved.len(), SYNCS_MAX + 1);
    for name in moved.into_iter().chain(["d"]) {
        ok(
            &n1,
            &format!("volume create {name} --size 1GiB --replicas 1 --master n1"),
        );
        // All replicas on n3, whatever was chosen; d is as it should be already.
        n1.edit(name, |r| r.copies[1].status = CopyStatus::Removed);
        let to = if name == "d" { "n2" } else { "n3" };
        n1.edit(name, |r| {
            r.copies.truncate(1);
            r.replicas_wanted = 0;
        });
        attach(&n1, name, "n1");
        let body = json!({"wishes": {"replicas": 1}});
        for other in ["n2", "n3", "n4"].iter().filter(|n| **n != to) {
            ok(&n1, &format!("node cordon {other}"));
        }
        let path = format!("/api/v1/volumes/default/{name}");
        assert_eq!(n1.ask(Method::PATCH, &path, Some(body)).0, 200);
        let new = arriving(&lab, &n1, name, to);
        n1.settle(name, &[new]);
        for other in ["n2", "n3", "n4"] {
            ok(&n1, &format!("node uncordon {other}"));
        }
    }
    // n4 is the only one that may take them.
    ok(&n1, "node cordon n2");
    attach_on_n3(&n1);
    let mut waiting = command(&n1, "node drain n3").spawn().unwrap();
    eventually("as many as may be are on their way", || {
        let moving = |name: &&&str| {
            let record = n1.record(name);
            entry(&record, "n3").is_some_and(|c| c.leaving) && entry(&record, "n4").is_some()
        };
        (moved.iter().filter(moving).count() == SYNCS_MAX).then_some(())
    });
    let view = n1.get("/api/v1/nodes/n3");
    let state = |v: &Value| v["state"].as_str().unwrap().to_string();
    let states: Vec<String> = view["drain"]["copies"]
        .as_array()
        .unwrap()
        .iter()
        .map(state)
        .collect();
    let expected = ["moving", "moving", "moving", "moving", "waiting"];
    assert_eq!(states, expected, "{view}");
    assert_eq!(view["drain"]["done"], false);
    assert_eq!(view["drain"]["attached"], json!(["default/here"]));
    let text = ok(&n1, "node inspect n3");
    assert!(
        text.contains("5 copies left") && text.contains("others go first"),
        "{text}"
    );
    refused(
        &n1,
        "volume attach d --node n3",
        11,
        &["volume default/d is attached on n1"],
    );
    ok(&n1, "volume create e --size 1GiB --master n1");
    refused(
        &n1,
        "volume attach e --node n3",
        11,
        &["node n3 is drained", "node undrain n3"],
    );
    assert!(waiting.try_wait().unwrap().is_none(), "it does not wait");
    for _ in moved {
        let name = eventually("one is on its way", || {
            moved.into_iter().find(|name| {
                let record = n1.record(name);
                entry(&record, "n3").is_some() && entry(&record, "n4").is_some()
            })
        });
        let new = arriving(&lab, &n1, name, "n4");
        n1.settle(name, &[new]);
    }
    let (code, out, err) = ended(waiting);
    assert_eq!((code, out.as_str()), (0, "n3\n"), "{err}");
    assert!(
        err.contains("5 copies left")
            && err.contains("note: node n3 still serves default/here: stop or migrate"),
        "{err}"
    );
    for name in moved {
        let record = n1.record(name);
        let nodes: Vec<&str> = record.present().map(|c| c.node.0.as_str()).collect();
        assert_eq!(nodes, ["n1", "n4"], "{name}");
        assert_eq!(record.in_sync().count(), 2);
    }
    assert!(
        entry(&n1.record("d"), "n2").is_some(),
        "a cordoned node keeps what it has"
    );
    // Empty it stays, whatever is created, until the drain is taken back.
    ok(&n1, "volume create f --size 1GiB --replicas 1");
    assert!(entry(&n1.record("f"), "n3").is_none());
    assert!(row(&n1, "n3").contains("false (drained)"));
    let (_, _, err) = on(&n1, "node uncordon n3");
    assert!(err.contains("lockstep node undrain n3"), "{err}");
    ok(&n1, "node undrain n3");
    assert!(row(&n1, "n3").contains(" true "), "{}", row(&n1, "n3"));
    drop(n3);
}

/// A volume without copies on n3 that n3 serves.
fn attach_on_n3(n1: &Node) {
    ok(n1, "volume create here --size 1GiB --master n1");
    attach(n1, "here", "n3");
}

#[test]
fn a_drain_is_interrupted_by_undrain_and_goes_on_after_restarts() {
    let lab = Lab::new();
    let [n1, n2, n3]: [Node; 3] = lab.nodes();
    ok(&n1, "node cordon n3");
    ok(&n1, "volume create a --size 1GiB --replicas 1 --master n1");
    attach(&n1, "a", "n1");
    // No other node: it is said why, and the drain stands.
    let (code, _, err) = on(&n1, "node drain n2");
    assert_eq!(code, 11, "{err}");
    for part in [
        "still holds 1 copy",
        "default/a",
        "n3: it is cordoned",
        "node undrain n2",
    ] {
        assert!(err.contains(part), "{part} in {err}");
    }
    assert_eq!(
        n1.get("/api/v1/nodes/n2")["drain"]["copies"][0]["state"],
        "blocked"
    );
    assert!(
        n1.events("a")
            .iter()
            .any(|e| e.starts_with("drain: the copy of default/a cannot leave n2"))
    );
    // Both processes start anew; then there is a place.
    n1.stop();
    n2.stop();
    let [n1, n2] = ["n1", "n2"].map(|n| lab.node(n));
    ok(&n3, "node uncordon n3");
    let new = arriving(&lab, &n1, "a", "n3");
    assert!(entry(&n1.record("a"), "n2").unwrap().leaving);
    // Taken back, what is on its way arrives all the same.
    ok(&n1, "node undrain n2");
    n1.settle("a", &[new]);
    assert!(entry(&n1.record("a"), "n2").is_none());
    assert!(n1.get("/api/v1/nodes/n2")["drain"].is_null());
    // A master leaves like any other copy, and another one takes its place.
    let mut waiting = command(&n1, "node drain n1").spawn().unwrap();
    let new = arriving(&lab, &n1, "a", "n2");
    assert!(waiting.try_wait().unwrap().is_none());
    n1.settle("a", &[new]);
    let (code, _, err) = ended(waiting);
    assert_eq!(code, 0, "{err}");
    let record = n1.record("a");
    assert!(entry(&record, "n1").is_none());
    assert_ne!(record.copy(record.master).unwrap().node.0, "n1");
    drop(n2);
}

#[test]
fn in_maintenance_no_lost_copy_is_replaced() {
    let lab = Lab::new();
    let [n1, _n2, _n3]: [Node; 3] = lab.nodes();
    ok(&n1, "cluster update --replace-after 1ms");
    ok(&n1, "cluster maintenance on");
    ok(&n1, "cluster maintenance on");
    ok(&n1, "volume create a --size 1GiB --replicas 1 --master n1");
    attach(&n1, "a", "n1");
    n1.edit("a", |r| {
        r.copies[1].status = CopyStatus::Missing;
        r.copies[1].base.last = Some(r.epoch);
    });
    // The loop saw the loss: it told the attachment of the record.
    eventually("the loss is seen", || {
        let levers = n1.host.levers.lock().unwrap();
        let missing = |r: &Record| r.copies[1].status == CopyStatus::Missing;
        levers.changes.iter().any(|(_, r)| missing(r)).then_some(())
    });
    let status = ok(&n1, "cluster status");
    assert!(
        status.contains("Maintenance:   on since") && status.contains("cluster maintenance off"),
        "{status}"
    );
    assert_eq!(n1.record("a").copies.len(), 2);
    ok(&n1, "cluster maintenance off");
    eventually("it is replaced", || {
        (n1.record("a").copies.len() == 3).then_some(())
    });
    assert!(ok(&n1, "cluster status").contains("off\n"));
    refused(&n1, "cluster maintenance", 2, &["on", "off"]);
    refused(&n1, "cluster maintenance perhaps", 2, &["on", "off"]);
}
