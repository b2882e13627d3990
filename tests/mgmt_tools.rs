//! What helps with everything else: JSON that programs can rely on, completions, manual pages, doctor, top, and what
//! `lockstep` alone says.

mod mgmt_support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use lockstep::cluster::host::{Difference, SyncProgress};
use lockstep::replication::ids::NodeName;
use lockstep::replication::record::CopyStatus;
use mgmt_support::{Lab, Node, eventually};
use serde_json::Value;

fn lockstep(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    command
        .env_remove("LOCKSTEP_HOST")
        .env_remove("RUST_LOG")
        .args(words);
    command
}

fn host(node: &Node) -> String {
    format!("unix:{}", node.run_dir.join("api.sock").display())
}

fn run(command: &mut Command) -> (i32, String, String) {
    let done = command.output().unwrap();
    (
        done.status.code().unwrap(),
        String::from_utf8(done.stdout).unwrap(),
        String::from_utf8(done.stderr).unwrap(),
    )
}

fn ok(node: &Node, line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    let (code, out, err) = run(lockstep(&words).env("LOCKSTEP_HOST", host(node)));
    assert_eq!(code, 0, "{line}: {err}");
    out
}

/// Objects whose keys are names that people gave.
const MAPS: [&str; 3] = ["labels", "rules", "health"];

/// All fields of a value: `a.b`, `list[].c`, `labels.*`.
fn paths(value: &Value, path: &str, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            let name = path.rsplit(['.', ']']).next().unwrap_or_default();
            for (key, value) in map {
                let key = if MAPS.contains(&name) { "*" } else { key };
                let next = match path {
                    "" => key.to_string(),
                    _ => format!("{path}.{key}"),
                };
                into.insert(next.clone());
                paths(value, &next, into);
            }
        }
        Value::Array(items) => {
            for item in items {
                paths(item, &format!("{path}[]"), into);
            }
        }
        _ => {}
    }
}

/// The fields that docs/CLI-JSON.md names, by command: each with whether it is always there.
fn documented() -> BTreeMap<String, BTreeMap<String, bool>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/CLI-JSON.md");
    let text = std::fs::read_to_string(path).unwrap();
    let mut commands: BTreeMap<String, BTreeMap<String, bool>> = BTreeMap::new();
    let mut command = String::new();
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            command = title
                .trim_matches('`')
                .trim_start_matches("lockstep ")
                .into();
        } else if let Some(row) = line.strip_prefix("| `") {
            let (field, rest) = row.split_once('`').unwrap();
            let always = !rest.contains("(sometimes)");
            commands
                .entry(command.clone())
                .or_default()
                .insert(field.into(), always);
        }
    }
    commands
}

#[test]
fn json_is_as_the_documentation_says() {
    let lab = Lab::new();
    let [n1, _n2, _n3, _n4]: [Node; 4] = lab.nodes();
    ok(&n1, "node label n1 zone=a");
    ok(&n1, "node label n2 zone=a");
    ok(&n1, "namespace create prod");
    let rule = "rule create ha -s env==prod --label lockstep.io/replicas=2";
    let mut seen: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    let mut see = |command: &'static str, line: &str| {
        let out = ok(&n1, &format!("{line} -o json"));
        let value: Value =
            serde_json::from_str(&out).unwrap_or_else(|e| panic!("{line}: {e}: {out}"));
        paths(&value, "", seen.entry(command).or_default());
    };
    see("rule create", rule);
    ok(&n1, "node cordon n4");
    see(
        "volume create",
        "volume create v --size 1GiB --label env=prod --label lockstep.io/topology-key=zone --master n1",
    );
    see(
        "volume create",
        "volume create other/w --size 1GiB --master n1",
    );
    see("volume attach", "volume attach v");
    ok(&n1, "node uncordon n4");
    // n3 goes: its copy is on its way to n4, and half there.
    ok(&n1, "node drain n3 --async");
    let copy = eventually("a copy is made for the move", || {
        let record = n1.record("v");
        let new = record.present().find(|c| c.node.0 == "n4")?;
        let made = lab.copy_on("n4", record.volume_id) == Some(new.copy_id);
        (made && new.status == CopyStatus::Missing).then_some(new.copy_id)
    });
    n1.host
        .levers
        .lock()
        .unwrap()
        .syncs
        .insert(copy, SyncProgress::new(1, 2, 1));
    n1.host.levers.lock().unwrap().differences = vec![Difference {
        offset: 65536,
        length: 4096,
        kind: "differs".into(),
        agree: vec![vec![NodeName("n1".into())], vec![NodeName("n2".into())]],
        unreadable: Vec::new(),
        repaired: false,
    }];
    see("volume scrub", "volume scrub v --repair");
    see("volume ls", "volume ls -A");
    see("volume inspect", "volume inspect v");
    see("volume update", "volume update v --suspend-deadline 20s");
    see("node ls", "node ls");
    see("node inspect", "node inspect n3");
    see("node inspect", "node inspect n1");
    see("node cordon", "node cordon n3");
    see("rule ls", "rule ls");
    see("rule inspect", "rule inspect ha");
    see("rule create", "rule update ha --label-add x=1 --reapply");
    see("namespace ls", "namespace ls");
    see("namespace inspect", "namespace inspect prod");
    see("cluster status", "cluster status");
    see("events", "events");
    see("top", "top --once --interval 100ms");
    see("volume detach", "volume detach v");
    let at = lab.dir.path().join("doctor");
    see(
        "doctor",
        &format!(
            "doctor --listen 127.0.0.1:0 --http 127.0.0.1:0 --data-dir {0} --run-dir {0}",
            at.display()
        ),
    );

    let documented = documented();
    let commands: Vec<&str> = seen.keys().copied().collect();
    let documented_commands: Vec<&str> = documented.keys().map(String::as_str).collect();
    assert_eq!(commands, documented_commands);
    for (command, fields) in &seen {
        let known = &documented[*command];
        let strip = |field: &String| field.trim_start_matches("[].").to_string();
        let fields: BTreeSet<String> = fields.iter().map(strip).collect();
        let unknown: Vec<&String> = fields.iter().filter(|f| !known.contains_key(*f)).collect();
        assert!(
            unknown.is_empty(),
            "{command}: docs/CLI-JSON.md lacks {unknown:#?}"
        );
        let gone: Vec<&String> = known
            .iter()
            .filter(|(field, always)| **always && !fields.contains(*field))
            .map(|(field, _)| field)
            .collect();
        assert!(
            gone.is_empty(),
            "{command}: documented, and no longer there: {gone:?}"
        );
    }
}

#[test]
fn lockstep_alone_says_what_to_type_first() {
    let lab = Lab::new();
    let (code, out, err) = run(&mut lockstep(&["--host", "unix:/nonexistent/api.sock"]));
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(
        err.contains("lockstep doctor") && err.contains("lockstep node --name n1"),
        "{err}"
    );
    let [n1]: [Node; 1] = lab.nodes();
    let (code, out, err) = run(lockstep(&[]).env("LOCKSTEP_HOST", host(&n1)));
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(
        err.contains("Node n1 answers") && err.contains("lockstep volume create vm1"),
        "{err}"
    );
}

#[test]
fn completions_and_manual_pages_name_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let (code, out, err) = run(&mut lockstep(&["completions", shell]));
        assert_eq!((code, err.as_str()), (0, ""));
        for word in ["volume", "--replicas", "maintenance", "drain"] {
            let word = if shell == "fish" {
                word.trim_start_matches('-')
            } else {
                word
            };
            assert!(out.contains(word), "{shell}: {word}");
        }
    }
    assert_eq!(run(&mut lockstep(&["completions", "tcsh"])).0, 2);
    let (code, page, _) = run(&mut lockstep(&["man", "volume", "create"]));
    assert_eq!(code, 0);
    assert!(
        page.starts_with(".ie") && page.contains(".TH lockstep-volume-create 1"),
        "{page}"
    );
    assert!(
        page.contains("Example") && page.contains("\\-\\-replicas"),
        "{page}"
    );
    let (code, _, err) = run(&mut lockstep(&["man", "volume", "destroy"]));
    assert_eq!(code, 2);
    assert!(
        err.contains("lockstep-volume --help") || err.contains("'destroy'"),
        "{err}"
    );

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    assert_eq!(run(&mut lockstep(&["man", "--dir", path])).0, 0);
    let pages: BTreeSet<String> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    for page in [
        "lockstep.1",
        "lockstep-node.1",
        "lockstep-node-drain.1",
        "lockstep-rule-create.1",
        "lockstep-top.1",
    ] {
        assert!(pages.contains(page), "{page} in {pages:?}");
    }
    let (code, _, err) = run(&mut lockstep(&["man", "--dir", "/nonexistent"]));
    assert_eq!(code, 10, "{err}");
}

#[test]
fn doctor_names_what_is_wrong_and_makes_nothing() {
    let lab = Lab::new();
    let [n1]: [Node; 1] = lab.nodes();
    let dir = tempfile::tempdir().unwrap();
    let new = dir.path().join("new");
    let new = new.to_str().unwrap();
    let registry = format!("sqlite:{}", lab.registry().display());
    let check = |words: &[&str]| {
        let mut all = vec!["doctor", "--data-dir", new, "--run-dir", new];
        all.extend(words);
        run(&mut lockstep(&all))
    };
    let (code, out, err) = check(&["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
    assert_eq!(code, 0, "{out}{err}");
    for part in [
        "kernel",
        "io_uring",
        "memlock",
        "disk",
        "replication port",
        "HTTP port",
        "clock",
        "not there yet",
    ] {
        assert!(out.contains(part), "{part} in {out}");
    }
    // A registry that is there is read, and the clocks of its nodes are compared.
    let (code, out, _) = check(&[
        "--listen",
        "127.0.0.1:0",
        "--http",
        "127.0.0.1:0",
        "--registry",
        &registry,
    ]);
    assert_eq!(code, 0, "{out}");
    assert!(
        out.contains("1 nodes, 0 volumes") && out.contains("ms apart from 1 nodes"),
        "{out}"
    );
    // The port of a node that runs is its own; anybody else's is a failure.
    let (code, out, _) = check(&["--listen", "127.0.0.1:0", "--http", &n1.http]);
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("is in use by node n1"), "{out}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let other = taken.local_addr().unwrap().to_string();
    let (code, out, err) = check(&["--listen", &other, "--http", "127.0.0.1:0"]);
    assert_eq!(code, 11, "{out}");
    assert!(
        out.contains("FAILED") && out.contains("-> end that") && err.contains("replication port"),
        "{out}{err}"
    );
    drop(taken);
    let broken = dir.path().join("broken.db");
    std::fs::write(&broken, vec![7; 8192]).unwrap();
    let broken = format!("sqlite:{}", broken.display());
    let (code, out, _) = check(&[
        "--listen",
        "127.0.0.1:0",
        "--http",
        "127.0.0.1:0",
        "--registry",
        &broken,
    ]);
    assert_eq!(code, 11, "{out}");
    // A configuration file is read as a node would.
    let config = dir.path().join("node.toml");
    std::fs::write(
        &config,
        "listen = \"127.0.0.1:0\"\nhttp = \"127.0.0.1:0\"\n",
    )
    .unwrap();
    let config = config.to_str().unwrap();
    assert_eq!(check(&["--config", config]).0, 0);
    assert_eq!(
        check(&["--listen", "0.0.0.0:5703", "--config", config]).0,
        10
    );
    assert!(!Path::new(new).exists(), "a check makes nothing");
}

#[test]
fn top_shows_rates_of_all_nodes_volumes() {
    let lab = Lab::new();
    let [n1, _n2]: [Node; 2] = lab.nodes();
    ok(&n1, "volume create idle --size 1GiB --master n1");
    ok(
        &n1,
        "volume create busy --size 1GiB --replicas 1 --master n1",
    );
    ok(&n1, "volume create prod/other --size 1GiB");
    // On the other node than the one that is asked.
    ok(&n1, "volume attach busy --node n2");
    let table = ok(&n1, "top --once --interval 100ms");
    let rows: Vec<Vec<&str>> = table
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(rows[0][..3], ["VOLUME", "HEALTH", "NODE"], "{table}");
    assert_eq!(rows.len(), 4, "{table}");
    assert_eq!(rows[1][..3], ["default/busy", "healthy", "n2"], "{table}");
    // What the host says is under way, and its copies with the master marked.
    assert!(rows[1].ends_with(&["2", "n1*", "n2"]), "{table}");
    assert_eq!(rows[2][..3], ["default/idle", "healthy", "-"], "{table}");
    assert_eq!(
        ok(&n1, "top -n prod --once --interval 100ms")
            .lines()
            .count(),
        2
    );
    let mut follower = lockstep(&["top", "-o", "json", "--interval", "100ms"])
        .env("LOCKSTEP_HOST", host(&n1))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    for line in lines.take(2) {
        let value: Value = serde_json::from_str(&line.unwrap()).unwrap();
        assert_eq!(value[0]["name"], "busy");
        assert_eq!(value[0]["inflight"], 2.0);
    }
    follower.kill().unwrap();
    follower.wait().unwrap();
    let (code, _, err) =
        run(lockstep(&["top", "--interval", "1ms"]).env("LOCKSTEP_HOST", host(&n1)));
    assert_eq!(code, 10, "{err}");
}
