//! Namespaces, labels and rules, on the real command line and over HTTP.

mod mgmt_support;

use std::process::Command;

use hyper::Method;
use mgmt_support::{Lab, Node, raw};
use serde_json::{Value, json};

/// Runs a command against a node's socket; the words are those between spaces outside of ''.
fn on(node: &Node, line: &str) -> (i32, String, String) {
    let host = format!("unix:{}", node.run_dir.join("api.sock").display());
    let words = line.split('\'').enumerate().flat_map(|(i, part)| {
        let whole: Vec<&str> = match i % 2 {
            1 => vec![part],
            _ => part.split_whitespace().collect(),
        };
        whole
    });
    let done = Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .env_remove("RUST_LOG")
        .env("LOCKSTEP_HOST", host)
        .args(words)
        .output()
        .unwrap();
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

fn inspected(node: &Node, name: &str) -> Value {
    serde_json::from_str(&ok(node, &format!("volume inspect {name} -o json"))).unwrap()
}

#[test]
fn a_rule_gives_a_new_volume_its_replicas() {
    let lab = Lab::new();
    let [n1, n2, _n3]: [Node; 3] = lab.nodes();
    assert_eq!(
        ok(
            &n1,
            "rule create ha --selector env==prod --label lockstep.io/replicas=2"
        ),
        "default/ha\n"
    );
    // Given a rule of one node, when a volume is created on another,
    let (_, out, err) = on(&n2, "volume create db --size 1GiB --label env=prod");
    assert_eq!(out, "default/db\n");
    // then it has what the rule says, and it is said which rule.
    assert_eq!(err, "note: rule ha: lockstep.io/replicas=2\n");
    let db = inspected(&n1, "db");
    assert_eq!(db["replicas"], 2);
    assert_eq!(db["labels"]["lockstep.io/replicas"], "2");
    assert_eq!(db["rules"]["lockstep.io/replicas"]["rule"], "ha");
    assert!(ok(&n1, "volume inspect db").contains("lockstep.io/replicas (ha)"));
    // One that is not selected has not,
    ok(&n2, "volume create scratch --size 1GiB --label env=dev");
    assert_eq!(inspected(&n1, "scratch")["replicas"], 0);
    // nor one in another namespace.
    ok(&n2, "volume create other/db --size 1GiB --label env=prod");
    assert_eq!(inspected(&n1, "other/db")["replicas"], 0);

    let table = ok(&n1, "rule ls");
    let columns: Vec<&str> = table.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(
        columns,
        [
            "NAMESPACE/NAME",
            "SELECTOR",
            "ACTION",
            "LABELS",
            "WEIGHT",
            "ACTIVE"
        ]
    );
    assert_eq!(
        table
            .lines()
            .nth(1)
            .unwrap()
            .split_whitespace()
            .collect::<Vec<_>>(),
        [
            "default/ha",
            "env==prod",
            "add",
            "lockstep.io/replicas=2",
            "5",
            "true"
        ]
    );
    let shown = ok(&n1, "rule inspect ha");
    assert!(
        shown.contains("default/db") && !shown.contains("scratch"),
        "{shown}"
    );
    // What the rule made is found by its label.
    let table = ok(&n1, "volume ls -A -l 'lockstep.io/replicas>1'");
    assert_eq!(table.lines().count(), 2, "{table}");
}

#[test]
fn flags_win_over_labels_and_labels_over_rules() {
    let lab = Lab::new();
    let [n1, _n2, _n3, _n4]: [Node; 4] = lab.nodes();
    ok(
        &n1,
        "rule create base -s '' --label lockstep.io/replicas=3 --label lockstep.io/failure-mode=hard --weight -1",
    );
    for (name, arguments, replicas, mode) in [
        ("r", "", 3, "hard"),
        ("l", "--label storageos.com/replicas=2", 2, "hard"),
        (
            "f",
            "--label lockstep.io/replicas=2 --replicas 1",
            1,
            "hard",
        ),
        ("m", "--replicas 1 --failure-tolerance 1", 1, "soft(1)"),
    ] {
        ok(
            &n1,
            &format!("volume create {name} --size 1GiB {arguments}"),
        );
        let volume = inspected(&n1, name);
        assert_eq!(
            (&volume["replicas"], &volume["failure_mode"]),
            (&json!(replicas), &json!(mode)),
            "{name}: {volume}"
        );
    }
    // And it stays so when the rules are applied again: what a person said is remembered.
    for name in ["r", "l", "f", "m"] {
        assert_eq!(
            ok(&n1, &format!("volume update {name} --reapply --preview")),
            "nothing would change\n"
        );
    }
    ok(&n1, "rule update base --label-add lockstep.io/replicas=0");
    ok(
        &n1,
        "rule update base --label-add lockstep.io/failure-mode=alwayson",
    );
    for (name, expected) in [
        ("r", "failure mode hard -> alwayson\nreplicas 3 -> 0"),
        (
            "l",
            "failure mode hard -> alwayson\nlabel lockstep.io/failure-mode hard -> alwayson\n",
        ),
        (
            "f",
            "failure mode hard -> alwayson\nlabel lockstep.io/failure-mode hard -> alwayson\n",
        ),
        ("m", "label lockstep.io/failure-mode hard -> alwayson\n"),
    ] {
        let out = ok(&n1, &format!("volume update {name} --reapply --preview"));
        assert!(out.starts_with(expected), "{name}: {out}");
    }
    // A preview changes nothing; a label that is set later wins over the flag of before.
    assert_eq!(inspected(&n1, "r")["replicas"], 3);
    ok(
        &n1,
        "volume update f --label-add lockstep.io/replicas=0 --async",
    );
    assert_eq!(inspected(&n1, "f")["replicas"], 0);
    ok(
        &n1,
        "volume update f --label-add lockstep.io/replicas=1 --async",
    );
    let out = ok(&n1, "volume update f --reapply --preview");
    assert!(!out.contains("replicas"), "{out}");
}

#[test]
fn a_changed_rule_reaches_volumes_that_exist_when_asked_and_says_before_what_it_would_do() {
    let lab = Lab::new();
    let [n1, _n2]: [Node; 2] = lab.nodes();
    ok(&n1, "volume create a --size 1GiB --label env=prod");
    ok(
        &n1,
        "volume create b --size 1GiB --label env=prod --replicas 0",
    );
    ok(&n1, "volume create c --size 1GiB");
    let line = "rule create ha -s env==prod --label lockstep.io/replicas=1";
    let (_, preview, _) = on(&n1, &format!("{line} --preview"));
    let rows: Vec<&str> = preview.lines().collect();
    assert!(
        rows[0].starts_with("VOLUME")
            && rows[1].starts_with("default/a  replicas 0 -> 1, a new copy on n"),
        "{preview}"
    );
    assert!(
        rows[2].starts_with("default/b  label"),
        "b keeps its flag: {preview}"
    );
    assert_eq!(rows.len(), 3, "{preview}");
    assert_eq!(on(&n1, "rule inspect ha").0, 8, "a preview writes nothing");

    let out = ok(&n1, &format!("{line} --reapply"));
    assert!(
        out.starts_with("default/ha\nVOLUME") && out.contains("default/a  replicas 0 -> 1"),
        "{out}"
    );
    assert_eq!(inspected(&n1, "a")["replicas"], 1);
    assert_eq!(inspected(&n1, "b")["replicas"], 0);
    // Again nothing changes.
    assert_eq!(ok(&n1, "rule update ha --reapply"), "default/ha\n");

    // What does not fit is named, and the others are done.
    ok(&n1, "volume create d --size 1GiB --label env=prod");
    let (code, out, err) = on(
        &n1,
        "rule update ha --label-add lockstep.io/replicas=2 --label-add x=1 --reapply",
    );
    assert_eq!(code, 11, "{out}{err}");
    assert!(
        out.contains(
            "default/a  none: volume default/a keeps its 1 replicas: 1 more copy needs a node"
        ),
        "{out}"
    );
    assert!(out.contains("default/b  label"), "{out}");
    assert!(err.contains("not changed: default/a, default/d"), "{err}");

    // Rules that are gone: their labels go when the rest is applied again, and replicas stay.
    assert_eq!(ok(&n1, "rule rm ha --preview").lines().count(), 4);
    let out = ok(&n1, "rule rm ha --reapply");
    assert!(
        out.contains("default/a  no label lockstep.io/replicas"),
        "{out}"
    );
    assert_eq!(inspected(&n1, "a")["replicas"], 1);
    assert_eq!(inspected(&n1, "a")["labels"], json!({"env": "prod"}));
    refused(&n1, "rule rm ha", 8, &["no rule default/ha"]);
}

#[test]
fn a_creation_that_a_rule_makes_too_large_names_the_rule() {
    let lab = Lab::new();
    let [n1]: [Node; 1] = lab.nodes();
    ok(&n1, "rule create ha -s '' --label lockstep.io/replicas=2");
    refused(
        &n1,
        "volume create a --size 1GiB",
        11,
        &["3 copies need 3 nodes", "rule ha asks for 2 replicas"],
    );
    ok(&n1, "volume create a --size 1GiB --replicas 0");
    ok(&n1, "rule update ha --inactive");
    ok(&n1, "volume create b --size 1GiB");
    ok(&n1, "rule update ha --active");
    refused(&n1, "volume create c --size 1GiB", 11, &["rule ha"]);
}

#[test]
fn rules_that_make_no_sense_are_refused_with_the_place_and_the_remedy() {
    let lab = Lab::new();
    let [n1]: [Node; 1] = lab.nodes();
    for (line, code, parts) in [
        (
            "-s 'env = = x' --label a=1",
            10,
            &["column 7", "k in (a,b)"][..],
        ),
        (
            "-s 'lockstep.io/replica>1' --label a=1",
            10,
            &["column 1", "lockstep.io/replicas"],
        ),
        (
            "-s env --label lockstep.io/replcas=1",
            10,
            &["did you mean lockstep.io/replicas"],
        ),
        (
            "-s env --label storageos.com/failure.mode=soft",
            10,
            &["lockstep.io/failure-mode"],
        ),
        ("-s env --label lockstep.io/replicas=7", 10, &["0 to 5"]),
        (
            "-s env --label lockstep.io/computeonly=1",
            10,
            &["on nodes, not on volumes"],
        ),
        ("-s env --label a", 10, &["k=v"]),
        ("-s env", 2, &["--label"]),
        ("--label a=1", 2, &["--selector"]),
        ("-s env --label a=1 --action delete", 2, &["add, remove"]),
    ] {
        refused(&n1, &format!("rule create r {line}"), code, parts);
    }
    ok(&n1, "rule create r -s env --label a=1");
    refused(
        &n1,
        "rule create r -s env --label a=2",
        9,
        &["exists already"],
    );
    refused(&n1, "rule update r", 10, &["nothing to change"]);
    refused(
        &n1,
        "rule update r --label-rm a",
        10,
        &["has no label to add"],
    );
    refused(&n1, "rule update s --weight 1", 8, &["rule ls -A"]);
    refused(&n1, "volume ls -l 'env in prod'", 10, &["column 8", "'('"]);
    // The API says the same.
    let (status, fault) = n1.post(
        "/api/v1/rules",
        json!({"namespace": "default", "name": "x", "selector": "a in (", "labels": {"a": "1"}}),
    );
    assert_eq!((status, &fault["code"]), (400, &json!("invalid_input")));
    assert!(
        fault["message"].as_str().unwrap().contains("column 7"),
        "{fault}"
    );
}

#[test]
fn a_namespace_is_removed_when_it_is_empty_and_its_rules_with_it() {
    let lab = Lab::new();
    let [n1, n2]: [Node; 2] = lab.nodes();
    assert_eq!(ok(&n1, "namespace create prod"), "prod\n");
    refused(&n2, "namespace create prod", 9, &["exists already"]);
    refused(&n2, "namespace create default", 9, &["exists already"]);
    refused(&n2, "namespace create a/b", 10, &["letters"]);
    refused(&n2, "namespace rm nowhere", 8, &["namespace ls"]);
    refused(&n2, "namespace rm default", 11, &["always there"]);

    // A volume or rule makes its namespace as well, and it is said, for it may be a slip.
    let (_, _, err) = on(&n1, "volume create -n porduction vm1 --size 1GiB");
    assert!(
        err.contains("namespace porduction is new: it has no rules"),
        "{err}"
    );
    assert_eq!(on(&n1, "volume create -n prod vm1 --size 1GiB").2, "");
    ok(
        &n1,
        "rule create -n prod ha -s env==prod --label lockstep.io/replicas=1",
    );
    let table = ok(&n2, "namespace ls");
    let rows: Vec<Vec<&str>> = table
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(rows[0], ["NAME", "VOLUMES", "RULES", "AGE"]);
    assert_eq!(rows[1], ["default", "0", "0", "-"]);
    assert_eq!(rows[2][..3], ["porduction", "1", "0"]);
    assert_eq!(rows[3][..3], ["prod", "1", "1"]);
    let shown = ok(&n2, "namespace inspect prod");
    assert!(shown.contains("vm1") && shown.contains("ha"), "{shown}");

    refused(
        &n2,
        "namespace rm prod",
        11,
        &["1 volume: vm1", "lockstep volume rm -n prod vm1"],
    );
    ok(&n2, "volume rm prod/vm1");
    assert_eq!(ok(&n2, "namespace rm prod"), "prod\n");
    refused(&n2, "namespace inspect prod", 8, &["no namespace prod"]);
    assert_eq!(ok(&n2, "rule ls -A").lines().count(), 1);
    // Only the socket takes changes; both ends tell what is.
    let http = lockstep::api::client::Target::Tcp(n1.http.clone());
    for path in [
        "/api/v1/namespaces",
        "/api/v1/rules",
        "/api/v1/namespaces/default",
    ] {
        assert_eq!(raw(&http, Method::GET, path, None).status, 200, "{path}");
    }
    let body = Some(json!({"name": "x"}));
    assert_eq!(
        raw(&http, Method::POST, "/api/v1/namespaces", body).status,
        405
    );
    assert_eq!(
        raw(&http, Method::DELETE, "/api/v1/namespaces/porduction", None).status,
        405
    );
}

#[test]
fn a_namespace_that_is_removed_and_filled_at_once_ends_up_whole() {
    let lab = Lab::new();
    let [n1]: [Node; 1] = lab.nodes();
    for round in 0..10 {
        ok(&n1, "namespace create race");
        let name = format!("vm{round}");
        let (made, removed) = std::thread::scope(|s| {
            let made = s.spawn(|| {
                let body = json!({"namespace": "race", "name": name, "size": 1 << 30});
                n1.post("/api/v1/volumes", body).0
            });
            let path = "/api/v1/namespaces/race";
            let removed = s.spawn(|| n1.ask(Method::DELETE, path, None).0);
            (made.join().unwrap(), removed.join().unwrap())
        });
        assert_eq!(made, 200, "a volume makes its namespace anew");
        // Whoever was first: the namespace is there, with the volume in it.
        assert!([200, 409].contains(&removed), "{removed}");
        let namespace = n1.get("/api/v1/namespaces/race");
        assert_eq!(namespace["volumes"], json!([name]));
        assert!(namespace["created"].is_string(), "{namespace}");
        ok(&n1, &format!("volume rm race/{name}"));
        ok(&n1, "namespace rm race");
    }
}
