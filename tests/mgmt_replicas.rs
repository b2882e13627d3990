//! Replicas up and down, moves and other masters: what people ask is written into the record or refused with the
//! reason, and commands wait for the outcome. The attachment's part is played by the test.

mod mgmt_support;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use hyper::Method;
use lockstep::cluster::host::SyncProgress;
use lockstep::replication::ids::{CopyId, NodeName};
use lockstep::replication::record::{CopyEntry, CopyStatus, Record};
use mgmt_support::{Lab, Node, eventually};
use serde_json::{Value, json};

fn update(node: &Node, wishes: Value) -> (u16, Value) {
    let body = json!({ "wishes": wishes });
    node.ask(Method::PATCH, "/api/v1/volumes/default/vm1", Some(body))
}

fn attach(node: &Node) {
    let (status, body) = node.post("/api/v1/volumes/default/vm1/attach", json!({}));
    assert_eq!(status, 200, "{body}");
}

fn on<'a>(record: &'a Record, node: &str) -> Option<&'a CopyEntry> {
    record.copy_on(&NodeName(node.into()))
}

fn nodes(record: &Record) -> BTreeSet<String> {
    record.present().map(|c| c.node.0.clone()).collect()
}

/// The copies that wait to be brought up to date, once their nodes have made them.
fn made(lab: &Lab, node: &Node, expected: usize) -> Vec<CopyId> {
    eventually("the new copies are made", || {
        let record = node.record("vm1");
        let made = record.present().filter(|c| {
            c.status == CopyStatus::Missing
                && lab.copy_on(&c.node.0, record.volume_id) == Some(c.copy_id)
        });
        let made: Vec<CopyId> = made.map(|c| c.copy_id).collect();
        (made.len() == expected).then_some(made)
    })
}

#[test]
fn more_replicas_get_their_copies_at_once_or_nothing_changes() {
    let lab = Lab::new();
    let [n1, _n2, n3, n4]: [Node; 4] = lab.nodes();
    n1.create("vm1", 1);
    attach(&n1);
    let before = n1.record("vm1");
    // Five copies do not fit; the nodes are named, those with a copy as well.
    let (status, fault) = update(&n1, json!({"replicas": 4, "failure_mode": "alwayson"}));
    let message = fault["message"].as_str().unwrap();
    assert_eq!(status, 409, "{fault}");
    assert!(
        message.contains("3 more copies need 3 nodes and 2 can take one"),
        "{message}"
    );
    assert!(message.contains("it has a copy of the volume"), "{message}");
    assert_eq!(n1.record("vm1"), before);

    let (status, body) = update(&n1, json!({"replicas": 3, "failure_mode": "alwayson"}));
    assert_eq!(status, 200, "{body}");
    let record = n1.record("vm1");
    assert_eq!(record.replicas_wanted, 3);
    assert_eq!(
        nodes(&record),
        ["n1", "n2", "n3", "n4"].map(String::from).into()
    );
    assert_eq!(record.in_sync().count(), 2);
    let new = made(&lab, &n1, 2);
    assert_eq!(n1.volume("vm1")["health"], "degraded");
    n1.settle("vm1", &new);
    let view = n1.volume("vm1");
    assert_eq!(
        (&view["health"], &view["replicas_in_sync"]),
        (&json!("healthy"), &json!(3))
    );
    drop((n3, n4));
}

#[test]
fn more_replicas_never_suspend_a_volume_that_serves() {
    let lab = Lab::new();
    let [n1, _n2, _n3]: [Node; 3] = lab.nodes();
    n1.create("vm1", 0);
    for (wishes, refusal) in [
        // soft tolerates the loss of one of two: none in sync is not enough, but of one it is.
        (json!({"replicas": 2}), Some("--replicas 1 now")),
        (
            json!({"replicas": 1, "failure_mode": "hard"}),
            Some("--failure-mode soft"),
        ),
        (
            json!({"replicas": 2, "failure_mode": "soft", "failure_tolerance": 0}),
            Some("--failure-mode alwayson"),
        ),
        (json!({"replicas": 1}), None),
    ] {
        let before = n1.record("vm1");
        let (status, body) = update(&n1, wishes.clone());
        match refusal {
            None => assert_eq!(status, 200, "{wishes}: {body}"),
            Some(hint) => {
                assert_eq!(body["code"], "invalid_state", "{wishes}: {body}");
                assert!(
                    body["hint"].as_str().unwrap().contains(hint),
                    "{wishes}: {body}"
                );
                assert_eq!(n1.record("vm1"), before);
            }
        }
    }
    let new = made(&lab, &n1, 1);
    // Not in sync yet, so two are too many still.
    assert_eq!(update(&n1, json!({"replicas": 2})).0, 409);
    n1.settle("vm1", &new);
    assert_eq!(update(&n1, json!({"replicas": 2})).0, 200);
}

#[test]
fn fewer_replicas_flag_the_copies_that_help_least() {
    let lab = Lab::new();
    let [n1, _n2, _n3]: [Node; 3] = lab.nodes();
    n1.create("vm1", 2);
    attach(&n1);
    let lost = on(&n1.record("vm1"), "n2").unwrap().copy_id;
    n1.edit("vm1", |r| {
        r.master = on(r, "n1").unwrap().copy_id;
        let at = r.copies.iter().position(|c| c.copy_id == lost).unwrap();
        r.copies[at].status = CopyStatus::Missing;
        r.copies[at].base.last = Some(r.epoch);
    });
    assert_eq!(update(&n1, json!({"replicas": 1})).0, 200);
    let record = n1.record("vm1");
    let leaving: Vec<CopyId> = record
        .copies
        .iter()
        .filter(|c| c.leaving)
        .map(|c| c.copy_id)
        .collect();
    assert_eq!((record.replicas_wanted, leaving), (1, vec![lost]));
    let view = n1.volume("vm1");
    let copies = view["copies"].as_array().unwrap();
    let entry = copies.iter().find(|c| c["node"] == "n2").unwrap();
    assert_eq!(entry["leaving"], true);
    // The attachment removes it, then its node deletes it; the master stays to the last.
    n1.settle("vm1", &[]);
    eventually("it is deleted", || {
        lab.copy_on("n2", record.volume_id).is_none().then_some(())
    });
    assert_eq!(update(&n1, json!({"replicas": 0})).0, 200);
    n1.settle("vm1", &[]);
    assert_eq!(nodes(&n1.record("vm1")), BTreeSet::from(["n1".to_string()]));
    assert_eq!(n1.volume("vm1")["health"], "healthy");
}

#[test]
fn a_stricter_mode_is_refused_while_the_attachment_misses_a_copy() {
    let lab = Lab::new();
    let [n1, n2]: [Node; 2] = lab.nodes();
    n1.create("vm1", 1);
    attach(&n1);
    let copy = on(&n1.record("vm1"), "n2").unwrap().copy_id;
    // Lost a moment ago: the record does not say so yet.
    n1.host
        .levers
        .lock()
        .unwrap()
        .lags
        .insert(copy, "silent for 900 ms".into());
    let tolerance = json!({"failure_mode": "soft", "failure_tolerance": 0});
    let (status, fault) = update(&n2, tolerance.clone());
    assert_eq!(
        (status, &fault["code"]),
        (409, &json!("invalid_state")),
        "{fault}"
    );
    assert!(
        fault["message"]
            .as_str()
            .unwrap()
            .contains("0 of 1 replicas in sync"),
        "{fault}"
    );
    n1.host.levers.lock().unwrap().lags.clear();
    assert_eq!(update(&n2, tolerance).0, 200);
}

#[test]
fn a_copy_moves_once_and_refusals_say_why() {
    let lab = Lab::new();
    let [n1, _n2, n3]: [Node; 3] = lab.nodes();
    n1.create("vm1", 1);
    let record = n1.record("vm1");
    let all: BTreeSet<String> = ["n1", "n2", "n3"].map(String::from).into();
    let free = all.difference(&nodes(&record)).next().unwrap().clone();
    let [master, replica]: [&str; 2] = [&record.copies[0].node.0, &record.copies[1].node.0];
    let go = |from: &str, to: &str| {
        n1.post(
            "/api/v1/volumes/default/vm1/move",
            json!({"from": from, "to": to}),
        )
    };
    for (from, to, code, part) in [
        (replica, replica, "invalid_input", "same node"),
        (free.as_str(), replica, "invalid_state", "no copy on"),
        (
            replica,
            master,
            "invalid_state",
            "it has a copy of the volume",
        ),
        (replica, "n9", "not_found", "no node n9"),
    ] {
        let (_, fault) = go(from, to);
        assert_eq!(fault["code"], code, "{from} {to}: {fault}");
        assert!(fault["message"].as_str().unwrap().contains(part), "{fault}");
    }
    assert_eq!(n1.record("vm1"), record);
    // A full disk takes none.
    let full = if free == "n3" {
        &n3
    } else if free == "n1" {
        &n1
    } else {
        &_n2
    };
    full.host.levers.lock().unwrap().free = Some(5);
    let (_, fault) = go(replica, &free);
    assert!(
        fault["message"]
            .as_str()
            .unwrap()
            .contains("its disk is full"),
        "{fault}"
    );
    full.host.levers.lock().unwrap().free = None;

    assert_eq!(go(replica, &free).0, 200);
    let new = made(&lab, &n1, 1);
    let moving = n1.record("vm1");
    assert!(on(&moving, replica).unwrap().leaving);
    assert_eq!(on(&moving, &free).unwrap().copy_id, new[0]);
    // Again is no error and no second copy; back is refused until the old one is gone.
    assert_eq!(go(replica, &free).0, 200);
    assert_eq!(n1.record("vm1"), moving);
    let (_, fault) = go(master, replica);
    assert!(
        fault["message"].as_str().unwrap().contains("is leaving"),
        "{fault}"
    );
    n1.settle("vm1", &new);
    assert_eq!(
        nodes(&n1.record("vm1")),
        BTreeSet::from([master.to_string(), free.clone()])
    );
}

#[test]
fn only_a_copy_in_sync_is_promoted_and_the_switch_is_waited_for() {
    let lab = Lab::new();
    let [n1, _n2, _n3]: [Node; 3] = lab.nodes();
    n1.create("vm1", 2);
    n1.edit("vm1", |r| {
        r.master = on(r, "n1").unwrap().copy_id;
        let at = r.copies.iter().position(|c| c.node.0 == "n2").unwrap();
        r.copies[at].status = CopyStatus::Missing;
        r.copies[at].base.last = Some(r.epoch);
    });
    attach(&n1);
    let promote = |node: &str, no_wait: bool| {
        let body = json!({"node": node, "no_wait": no_wait});
        n1.post("/api/v1/volumes/default/vm1/promote", body)
    };
    for (node, why) in [("n2", "it is not in sync"), ("n9", "it does not exist")] {
        let (_, fault) = promote(node, false);
        assert_eq!(fault["code"], "invalid_state", "{fault}");
        assert!(fault["message"].as_str().unwrap().contains(why), "{fault}");
        assert_eq!(fault["hint"], "its copies in sync are on n1, n3");
    }
    let lagging = on(&n1.record("vm1"), "n3").unwrap().copy_id;
    n1.host
        .levers
        .lock()
        .unwrap()
        .lags
        .insert(lagging, "silent".into());
    assert!(
        promote("n3", false).1["message"]
            .as_str()
            .unwrap()
            .contains("cannot be reached")
    );
    n1.host.levers.lock().unwrap().lags.clear();
    // The present master: nothing to do.
    assert_eq!(promote("n1", false).0, 200);
    assert_eq!(n1.record("vm1").preferred, None);

    std::thread::scope(|s| {
        let waiting = s.spawn(|| promote("n3", false));
        eventually("the wish is written", || {
            (n1.record("vm1").preferred == Some(lagging)).then_some(())
        });
        n1.settle("vm1", &[]);
        let (status, body) = waiting.join().unwrap();
        assert_eq!(status, 200, "{body}");
    });
    assert_eq!(n1.volume("vm1")["master"]["node"], "n3");

    // One that is lost while it is waited for is not.
    std::thread::scope(|s| {
        let waiting = s.spawn(|| promote("n1", false));
        eventually("the wish is written", || n1.record("vm1").preferred);
        n1.edit("vm1", |r| {
            let at = r.copies.iter().position(|c| c.node.0 == "n1").unwrap();
            r.copies[at].status = CopyStatus::Missing;
        });
        let (status, fault) = waiting.join().unwrap();
        assert_eq!(status, 409, "{fault}");
        assert!(
            fault["message"]
                .as_str()
                .unwrap()
                .contains("no longer in sync"),
            "{fault}"
        );
    });
    assert_eq!(promote("n1", true).0, 409);
}

#[test]
fn the_command_line_waits_for_copies_and_shows_how_far_they_are() {
    let lab = Lab::new();
    let [n1, _n2, _n3]: [Node; 3] = lab.nodes();
    n1.create("vm1", 1);
    attach(&n1);
    let spawn = |line: &str| {
        Command::new(env!("CARGO_BIN_EXE_lockstep"))
            .env(
                "LOCKSTEP_HOST",
                format!("unix:{}", n1.run_dir.join("api.sock").display()),
            )
            .args(line.split_whitespace())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    n1.edit("vm1", |r| r.master = on(r, "n1").unwrap().copy_id);
    let mut waiting = spawn("volume update vm1 --replicas 2");
    let new = made(&lab, &n1, 1);
    n1.host
        .levers
        .lock()
        .unwrap()
        .syncs
        .insert(new[0], SyncProgress::new(1 << 30, 4 << 30, 256 << 20));
    let view = eventually("the attachment knows the new copy", || {
        let view = n1.volume("vm1");
        (view["health"] == "syncing").then_some(view)
    });
    assert_eq!(
        view["why"], "the copy on n3 is syncing, 1 GiB left",
        "{view}"
    );
    assert_eq!(view["copies"][2]["state"], "syncing");
    let shown = spawn("volume inspect vm1").wait_with_output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(
        shown.contains("[###############.....] 75 %  1 GiB left  256 MiB/s  ETA 0:04"),
        "{shown}"
    );
    let metrics = mgmt_support::raw(
        &lockstep::api::client::Target::Tcp(n1.http.clone()),
        Method::GET,
        "/metrics",
        None,
    );
    let metrics = String::from_utf8(metrics.body.to_vec()).unwrap();
    for (name, bytes) in [
        ("remaining_bytes", 1u64 << 30),
        ("total_bytes", 4 << 30),
        ("bytes_per_second", 256 << 20),
    ] {
        let labels = "{namespace=\"default\",volume=\"vm1\"}";
        let line = format!("lockstep_volume_sync_{name}{labels} {bytes}");
        assert!(metrics.lines().any(|l| l == line), "{line} in {metrics}");
    }

    assert!(waiting.try_wait().unwrap().is_none(), "it does not wait");
    n1.host.levers.lock().unwrap().syncs.clear();
    n1.settle("vm1", &new);
    let done = waiting.wait_with_output().unwrap();
    let err = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.code(), Some(0), "{err}");
    assert_eq!(String::from_utf8(done.stdout).unwrap(), "default/vm1\n");
    assert!(!err.contains('\r') && !err.is_empty(), "{err}");

    // Asynchronous ones return; others end when somebody else decides otherwise.
    let done = spawn("volume update vm1 --replicas 1 --async")
        .wait_with_output()
        .unwrap();
    assert_eq!(done.status.code(), Some(0));
    let mut waiting = spawn("volume update vm1 --replicas 1");
    let mut line = String::new();
    let mut err = BufReader::new(waiting.stderr.take().unwrap());
    err.read_line(&mut line).unwrap();
    assert_eq!(line, "waiting for the copy on n3 to leave\n");
    n1.edit("vm1", |r| r.replicas_wanted = 0);
    assert_eq!(waiting.wait().unwrap().code(), Some(11));
    err.read_line(&mut line).unwrap();
    assert!(
        line.ends_with("default/vm1 was changed to 0 replicas meanwhile\n"),
        "{line}"
    );
    let done = spawn("volume promote vm1 --node n2 --async")
        .wait_with_output()
        .unwrap();
    assert_eq!(done.status.code(), Some(0));
    let record = n1.record("vm1");
    assert_eq!(record.preferred, Some(on(&record, "n2").unwrap().copy_id));
}
