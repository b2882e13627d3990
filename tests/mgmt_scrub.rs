//! `volume scrub` as the management plane does it: who compares, who follows, who is refused, and what the command says.

mod mgmt_support;

use std::process::Command;

use lockstep::cluster::host::{Difference, Host};
use lockstep::replication::ids::NodeName;
use mgmt_support::{Lab, Node, eventually};
use serde_json::{Value, json};

struct Done {
    code: i32,
    out: String,
    err: String,
}

fn run(node: &Node, line: &str) -> Done {
    let output = Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .env_remove("RUST_LOG")
        .env(
            "LOCKSTEP_HOST",
            format!("unix:{}", node.run_dir.join("api.sock").display()),
        )
        .args(line.split_whitespace())
        .output()
        .unwrap();
    Done {
        code: output.status.code().unwrap(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

fn ok(node: &Node, line: &str) -> String {
    let done = run(node, line);
    assert_eq!(done.code, 0, "{line}: {}", done.err);
    done.out
}

/// The next scrub finds that n2's copy is unlike the others.
fn differ(node: &Node) {
    let name = |n: &str| NodeName(n.into());
    node.host.levers.lock().unwrap().differences = vec![Difference {
        offset: 1 << 20,
        length: 8192,
        kind: "differs".into(),
        agree: vec![vec![name("n1"), name("n3")], vec![name("n2")]],
        unreadable: Vec::new(),
        repaired: false,
    }];
}

fn scrub(node: &Node, name: &str) -> Value {
    node.volume(name)["scrub"].clone()
}

#[test]
fn the_node_that_serves_compares_whoever_is_asked() {
    let lab = Lab::new();
    let [n1, n2, _n3]: [Node; 3] = lab.nodes();
    ok(&n1, "volume create v --size 1GiB --replicas 2 --master n1");
    ok(&n1, "volume attach v");
    let done = run(&n2, "volume scrub v");
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(done.out.contains("no difference"), "{}", done.out);
    // What it found is remembered, and the wish is gone.
    let seen = scrub(&n2, "v");
    assert_eq!(
        (&seen["state"], &seen["node"]),
        (&json!("done"), &json!("n1"))
    );
    let id = n1.volume_id("v");
    assert_eq!(n1.store.spec(id).unwrap().unwrap().0.scrub, None);
    // Differences fail the command, which prints them first: offset, length, who agrees with whom.
    differ(&n1);
    let done = run(&n2, "volume scrub v");
    assert_eq!(done.code, 11, "{}", done.err);
    assert!(
        done.out.contains("1048576") && done.out.contains("n1 = n3 | n2"),
        "{}",
        done.out
    );
    assert!(
        done.err.contains("8 KiB of volume default/v differ")
            && done.err.contains("volume scrub default/v --repair")
            && done.err.contains("volume promote"),
        "{}",
        done.err
    );
    let done = run(&n2, "volume scrub v -o json");
    let found: Value = serde_json::from_str(&done.out).unwrap();
    assert_eq!(found["differences"][0]["length"], 8192);
    // Repaired ones do not.
    let done = run(&n2, "volume scrub v --repair");
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(done.out.contains("8 KiB repaired"), "{}", done.out);
    let rules: Vec<String> = n1
        .get("/api/v1/events?volume=v")
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["rule"].as_str().unwrap().to_string())
        .collect();
    assert!(rules.contains(&"scrub".to_string()), "{rules:?}");
    assert!(ok(&n1, "volume inspect v").contains("8 KiB repaired"));
}

#[test]
fn a_second_scrub_follows_the_first_or_is_refused_by_name_and_one_can_be_stopped() {
    let lab = Lab::new();
    let [n1, n2]: [Node; 2] = lab.nodes();
    ok(&n1, "volume create v --size 1GiB --replicas 1 --master n1");
    ok(&n1, "volume attach v");
    let refused = run(&n1, "volume scrub v --stop");
    assert_eq!(refused.code, 11, "{}", refused.err);
    assert!(
        refused
            .err
            .contains("no scrub of volume default/v is under way")
    );
    n1.host.levers.lock().unwrap().endless = true;
    std::thread::scope(|scope| {
        // Given one that somebody waits for,
        let waiting = scope.spawn(|| run(&n2, "volume scrub v"));
        let first = eventually("it runs", || {
            let seen = scrub(&n1, "v");
            (seen["state"] == "running").then_some(seen)
        });
        // when another one of its kind is asked for, then that follows,
        let second = ok(&n1, "volume scrub v --async -o json");
        let second: Value = serde_json::from_str(&second).unwrap();
        assert_eq!(
            (&second["id"], &second["node"], &second["followed"]),
            (&first["id"], &json!("n1"), &json!(true))
        );
        // and one of another kind is refused.
        let refused = run(&n1, "volume scrub v --repair");
        assert_eq!(refused.code, 11, "{}", refused.err);
        assert!(
            refused.err.contains("without --repair")
                && refused.err.contains("under way on n1")
                && refused.err.contains("--stop"),
            "{}",
            refused.err
        );
        // When it is stopped, then whoever waits is told so, and not that all is well.
        ok(&n1, "volume scrub v --stop");
        let waiting = waiting.join().unwrap();
        assert_eq!(waiting.code, 12, "{}", waiting.err);
        assert!(waiting.err.contains("it was stopped"), "{}", waiting.err);
    });
    // And the next one is a new one.
    n1.host.levers.lock().unwrap().endless = false;
    ok(&n1, "volume scrub v --repair");
    let (status, fault) = n1.ask(
        hyper::Method::GET,
        "/api/v1/volumes/default/none/scrub",
        None,
    );
    assert_eq!((status, &fault["code"]), (404, &json!("not_found")));
}

#[test]
fn a_detached_volume_is_attached_for_it_and_released_again() {
    let lab = Lab::new();
    let [n1, _n2]: [Node; 2] = lab.nodes();
    ok(&n1, "volume create v --size 1GiB --replicas 1 --master n1");
    assert!(ok(&n1, "volume scrub v").contains("no difference"));
    eventually("it is released", || {
        (n1.record("v").attachment.is_none() && n1.host.attachments().is_empty()).then_some(())
    });
    // It is remembered without the attachment.
    assert_eq!(scrub(&n1, "v")["state"], "done");
    // A machine goes first: the scrub ends, and whoever waits is told to ask again.
    n1.host.levers.lock().unwrap().endless = true;
    ok(&n1, "volume scrub v --async");
    eventually("it runs", || {
        (scrub(&n1, "v")["state"] == "running").then_some(())
    });
    ok(&n1, "volume attach v");
    let ended = eventually("it has ended", || {
        let seen = scrub(&n1, "v");
        (seen["state"] == "broken_off").then_some(seen)
    });
    assert!(
        ended["why"].as_str().unwrap().contains("has ended"),
        "{ended}"
    );
}

#[test]
fn a_scrub_ends_with_the_process_that_compares() {
    let lab = Lab::new();
    let [n1, n2]: [Node; 2] = lab.nodes();
    ok(&n1, "volume create v --size 1GiB --replicas 1 --master n1");
    ok(&n1, "volume attach v");
    n1.host.levers.lock().unwrap().endless = true;
    let asked: Value = serde_json::from_str(&ok(&n2, "volume scrub v --async -o json")).unwrap();
    eventually("it runs", || {
        (scrub(&n2, "v")["state"] == "running").then_some(())
    });
    n1.stop();
    let seen = scrub(&n2, "v");
    assert_eq!(
        (&seen["id"], &seen["state"]),
        (&asked["id"], &json!("waiting"))
    );
    assert!(
        seen["why"].as_str().unwrap().contains("does not answer"),
        "{seen}"
    );
    // Another one does not wait for it, nor begins where nobody serves.
    let refused = run(&n2, "volume scrub v");
    assert_eq!(refused.code, 12, "{}", refused.err);
    assert!(refused.err.contains("node n1"), "{}", refused.err);
    // Started again, nothing of it is left.
    let n1 = lab.node("n1");
    let seen = eventually("n1 answers", || {
        let seen = scrub(&n2, "v");
        (seen["state"] == "broken_off").then_some(seen)
    });
    assert!(
        seen["why"].as_str().unwrap().contains("has ended"),
        "{seen}"
    );
    assert!(ok(&n2, "volume scrub v").contains("no difference"));
    n1.stop();
}
