//! What helps with everything else: JSON that programs can rely on, completions, manual pages, doctor, top, and what
//! `lockstep` alone says.

mod cluster_support;
mod etcd_support;
mod mgmt_support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use cluster_support::Cluster;
use cluster_support::client::Disk;
use etcd_support::Etcd;
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

/// All fields of a value, each with the types that it was seen to have: `a.b`, `list[].c`, `labels.*`.
fn paths(value: &Value, path: &str, into: &mut Fields) {
    match value {
        Value::Object(map) => {
            let name = path.rsplit(['.', ']']).next().unwrap_or_default();
            for (key, value) in map {
                let key = if MAPS.contains(&name) { "*" } else { key };
                let next = match path.trim_start_matches("[]") {
                    "" => key.to_string(),
                    path => format!("{}.{key}", path.trim_start_matches('.')),
                };
                into.entry(next.clone()).or_default().insert(kind(value));
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

type Fields = BTreeMap<String, BTreeSet<&'static str>>;

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// What docs/CLI-JSON.md says of a field.
struct Documented {
    kinds: BTreeSet<String>,
    always: bool,
}

/// The fields that docs/CLI-JSON.md names, by command.
fn documented() -> BTreeMap<String, BTreeMap<String, Documented>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/CLI-JSON.md");
    let text = std::fs::read_to_string(path).unwrap();
    let mut commands: BTreeMap<String, BTreeMap<String, Documented>> = BTreeMap::new();
    let mut command = String::new();
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            command = title.trim_matches('`').into();
        } else if let Some(row) = line.strip_prefix("| `") {
            let (field, rest) = row.split_once("` | ").unwrap();
            let (kinds, rest) = rest.split_once(" | ").unwrap();
            let field_is = Documented {
                kinds: kinds.split(", ").map(String::from).collect(),
                always: !rest.contains("(sometimes)"),
            };
            let fields = commands.entry(command.clone()).or_default();
            fields.insert(field.into(), field_is);
        }
    }
    commands
}

/// What commands printed, against what docs/CLI-JSON.md says that they print.
fn compare(seen: &BTreeMap<&str, Fields>) {
    let documented = documented();
    for (command, fields) in seen {
        let known = documented.get(*command);
        let known =
            known.unwrap_or_else(|| panic!("docs/CLI-JSON.md lacks {command}: {fields:#?}"));
        for (field, kinds) in fields {
            let says = known.get(field);
            let says = says.unwrap_or_else(|| panic!("{command}: docs/CLI-JSON.md lacks {field}"));
            let other: Vec<_> = kinds.iter().filter(|k| !says.kinds.contains(**k)).collect();
            assert!(
                other.is_empty(),
                "{command}: {field} is {other:?} and documented as {:?}",
                says.kinds
            );
        }
        for (field, says) in known {
            assert!(
                !says.always || fields.contains_key(field),
                "{command}: {field} is documented, and no longer there"
            );
        }
    }
}

fn parse(line: &str, out: &str) -> Value {
    serde_json::from_str(out).unwrap_or_else(|e| panic!("{line}: {e}: {out}"))
}

#[test]
fn json_is_as_the_documentation_says() {
    let lab = Lab::new();
    let [n1, n2, _n3, _n4, n5]: [Node; 5] = lab.nodes();
    ok(&n1, "node label n1 zone=a");
    ok(&n1, "node label n2 zone=a");
    n5.stop();
    let mut seen: BTreeMap<&str, Fields> = BTreeMap::new();
    let mut see = |command: &'static str, line: &str| {
        let value = parse(line, &ok(&n1, &format!("{line} -o json")));
        paths(&value, "", seen.entry(command).or_default());
    };
    see("namespace create", "namespace create prod");
    see("namespace create", "namespace create old");
    see("namespace create", "namespace rm old");
    see(
        "rule create",
        "rule create ha -s env==prod --label lockstep.io/replicas=2",
    );
    see("rule create", "rule create old -s x --label y=1");
    see("rule create", "rule rm old");
    see("node cordon", "node cordon n4");
    see(
        "volume create",
        "volume create v --size 1GiB --label env=prod --label lockstep.io/topology-key=zone --master n1",
    );
    see(
        "volume create",
        "volume create other/w --size 1GiB --master n1",
    );
    see("volume attach", "volume attach v");
    see("volume attach", "volume attach other/w --async");
    see("node cordon", "node uncordon n4");
    // n3 goes: its copy is on its way to n4, and half there.
    see("node cordon", "node drain n3 --async");
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
    see("volume scrub --async", "volume scrub v --async");
    see("volume scrub --stop", "volume scrub v --stop");
    see("volume ls", "volume ls -A");
    see("volume inspect", "volume inspect v");
    see("volume update", "volume update v --suspend-deadline 20s");
    see("node ls", "node ls");
    see("node inspect", "node inspect n3");
    see("node inspect", "node inspect n1");
    see("node cordon", "node undrain n3");
    see("node cordon", "node label n3 zone=b");
    see("node cordon", "node rm n5");
    see("rule ls", "rule ls");
    see("rule inspect", "rule inspect ha");
    see("rule create", "rule update ha --label-add x=1 --reapply");
    see("namespace ls", "namespace ls");
    see("namespace inspect", "namespace inspect prod");
    see("cluster status", "cluster status");
    see("cluster update", "cluster update --replace-after 5m");
    see("cluster update", "cluster maintenance on");
    see("cluster status", "cluster status");
    see("cluster update", "cluster maintenance off");
    see("events", "events");
    see("top", "top --once --interval 100ms");
    see("volume detach", "volume promote v --node n2 --async");
    see("volume detach", "volume detach v");
    see(
        "volume create",
        "volume create x --size 1GiB --replicas 1 --master n1",
    );
    see("volume detach", "volume move x n1 n4 --async");
    see("volume detach", "volume detach other/w --force");
    see("volume detach", "volume rm other/w");
    let at = lab.dir.path().join("doctor");
    see(
        "doctor",
        &format!(
            "doctor --listen 127.0.0.1:0 --http 127.0.0.1:0 --data-dir {0} --run-dir {0}",
            at.display()
        ),
    );
    // One object a line.
    let mut follower = lockstep(&["events", "-f", "-o", "json"])
        .env("LOCKSTEP_HOST", host(&n2))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    for line in lines.take(3) {
        let value = parse("events -f", &line.unwrap());
        paths(&value, "", seen.entry("events").or_default());
    }
    follower.kill().unwrap();
    follower.wait().unwrap();

    compare(&seen);
    // What is documented and not seen here is seen in the next test.
    let elsewhere = ["node upgrade", "registry migrate"];
    let documented = documented();
    let commands = documented.keys().map(String::as_str);
    let here: Vec<&str> = commands.filter(|c| !elsewhere.contains(c)).collect();
    assert_eq!(seen.keys().copied().collect::<Vec<&str>>(), here);
}

#[test]
fn json_of_what_only_real_nodes_do_is_as_the_documentation_says() {
    // Given a node under a guest, whose registry is a file,
    let mut cluster = Cluster::start(1);
    let socket = cluster.serve("v", "--size 16MiB", "");
    let guest = Disk::open(&socket, 1, 1);
    let mut seen: BTreeMap<&str, Fields> = BTreeMap::new();
    // when its program is replaced, and then its registry is moved,
    let upgraded = cluster.json(1, "node upgrade");
    drop(guest);
    assert!(cluster.stop(1).success());
    let etcd = Etcd::start(1);
    let from = format!("sqlite:{}", cluster.registry().display());
    let words = [
        "registry",
        "migrate",
        &from,
        &etcd.location(&[1]),
        "-o",
        "json",
    ];
    let (code, out, err) = run(&mut lockstep(&words));
    assert_eq!(code, 0, "{err}");
    // then both say what is documented.
    paths(&upgraded, "", seen.entry("node upgrade").or_default());
    let migrated = parse("registry migrate", &out);
    paths(&migrated, "", seen.entry("registry migrate").or_default());
    compare(&seen);
    assert_eq!(
        (&upgraded["state"], &upgraded["taken_over"]),
        (&"done".into(), &1.into())
    );
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
