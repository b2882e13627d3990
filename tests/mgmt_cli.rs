//! The real binary: what it prints, how it fails and with which exit code.

mod mgmt_support;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use lockstep::cluster::host::{HostError, SyncProgress};
use mgmt_support::{Lab, Node, eventually};
use serde_json::Value;

fn lockstep() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    command.env_remove("LOCKSTEP_HOST").env_remove("RUST_LOG");
    command
}

fn output(args: &[&str]) -> Output {
    lockstep().args(args).output().unwrap()
}

/// Runs a command against a node's socket.
fn on(node: &Node, line: &str) -> (i32, String, String) {
    let host = format!("unix:{}", node.run_dir.join("api.sock").display());
    let done = lockstep()
        .env("LOCKSTEP_HOST", host)
        .args(line.split_whitespace())
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

#[test]
fn wrong_usage_exits_with_2() {
    for args in [
        &["frobnicate"][..],
        &[],
        &["volume"],
        &["volume", "create", "vm1"],
        &["volume", "create", "--size", "1GiB"],
        &["volume", "ls", "-o", "xml"],
        &["volume", "attach", "vm1", "--num-queues", "many"],
        &["node"],
        &["node", "--listen", "nowhere", "--name", "n1"],
        &["--host", "tcp:1", "volume", "ls"],
        &["volume", "promote", "vm1"],
    ] {
        let done = output(args);
        assert_eq!(done.status.code(), Some(2), "{args:?}");
        assert!(
            !done.stderr.is_empty() && done.stdout.is_empty(),
            "{args:?}"
        );
    }
}

#[test]
fn input_that_makes_no_sense_exits_with_10_and_says_what_would() {
    // Reached from other machines, but for where those ask how the node is.
    let public = |listen, noun, more: &[&'static str]| {
        let registry = "etcd:http://10.0.0.9:2379";
        let public = ["--insecure-plaintext", "--registry", registry];
        [&[noun, "--listen", listen], &public[..], more].concat()
    };
    let http = "give --http 10.0.0.1:5705";
    for (args, expected) in [
        (&["volume", "create", "vm1", "--size", "big"][..], "10GiB"),
        (&["volume", "create", "../vm1", "--size", "1GiB"], "letters"),
        (
            &["volume", "create", "vm1", "--size", "1GiB", "--label", "x"],
            "k=v",
        ),
        (
            &[
                "volume",
                "create",
                "vm1",
                "--size",
                "1GiB",
                "--label",
                "lockstep.io/replica=1",
            ],
            "lockstep.io/replicas",
        ),
        (
            &[
                "volume",
                "create",
                "vm1",
                "--size",
                "1GiB",
                "--suspend-deadline",
                "soon",
            ],
            "30s",
        ),
        (&["node", "--name", "n 1"], "letters"),
        (
            &["node", "--name", "n1", "--registry", "redis:x"],
            "sqlite:PATH",
        ),
        (
            &["node", "--name", "n1", "--listen", "0.0.0.0:5703"],
            "--listen",
        ),
        (&public("10.0.0.1:5703", "node", &["--name", "n1"]), http),
        (&public("10.0.0.1:5703", "doctor", &[]), http),
        (
            &public("0.0.0.0:5703", "doctor", &["--http", "0.0.0.0:5705"]),
            "give --advertise HOST:5703",
        ),
        (
            &["node", "--name", "n1", "--vhost-user-blk", "vm1,colour=red"],
            "failure-mode=",
        ),
        (
            &["node", "--name", "n1", "--config", "/nonexistent.toml"],
            "--config",
        ),
        (
            &["node", "--name", "n1", "--label", "lockstep.io/compute=1"],
            "lockstep.io/computeonly",
        ),
        (&["node", "inspect", "a/b"], "letters"),
    ] {
        let done = output(args);
        let err = String::from_utf8(done.stderr).unwrap();
        assert_eq!(done.status.code(), Some(10), "{args:?}: {err}");
        assert!(
            err.starts_with("error: ") && err.contains(expected),
            "{args:?}: {err}"
        );
    }
}

#[test]
fn without_a_node_the_message_says_how_to_start_one() {
    let done = output(&["--host", "unix:/nonexistent/api.sock", "volume", "ls"]);
    let err = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.code(), Some(12));
    assert!(err.contains("/nonexistent/api.sock"), "{err}");
    assert!(err.contains("lockstep node --name"), "{err}");
}

#[test]
fn every_help_has_an_example() {
    for args in [
        &["volume", "create"][..],
        &["volume", "ls"],
        &["volume", "inspect"],
        &["volume", "update"],
        &["volume", "attach"],
        &["volume", "detach"],
        &["volume", "rm"],
        &["node"],
        &["node", "ls"],
        &["node", "inspect"],
        &["cluster", "status"],
        &["events"],
    ] {
        let done = lockstep().args(args).arg("--help").output().unwrap();
        let out = String::from_utf8(done.stdout).unwrap();
        assert!(done.status.success(), "{args:?}");
        assert!(
            out.contains("Example") && out.contains("  lockstep "),
            "{args:?}: {out}"
        );
    }
}

#[test]
fn a_config_file_with_a_wrong_key_is_refused_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("node.toml");
    std::fs::write(&path, "name = \"n1\"\nlissten = \"127.0.0.1:1\"\n").unwrap();
    let done = output(&["node", "--config", path.to_str().unwrap()]);
    let err = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.code(), Some(10));
    assert!(
        err.contains("lissten") && err.contains("hint: did you mean listen?"),
        "{err}"
    );
}

#[test]
fn a_volume_lives_its_life_on_the_command_line() {
    let lab = Lab::new();
    let [n1, n2]: [Node; 2] = lab.nodes();
    assert_eq!(
        ok(
            &n1,
            "volume create vm1 --size 10GiB --replicas 1 --failure-mode hard --label env=prod --master n2"
        ),
        "default/vm1\n"
    );
    let table = ok(&n2, "volume ls");
    let lines: Vec<&str> = table.lines().collect();
    let columns: Vec<&str> = lines[0].split_whitespace().collect();
    assert_eq!(
        columns,
        [
            "NAMESPACE/NAME",
            "SIZE",
            "ATTACHED",
            "STATUS",
            "REPLICAS",
            "MASTER",
            "AGE"
        ]
    );
    assert!(
        lines[1].starts_with("default/vm1     10 GiB  -         healthy  1/1       n2 (online)  "),
        "{table}"
    );

    let socket = ok(&n1, "volume attach vm1 --num-queues 2");
    assert!(Path::new(socket.trim()).exists(), "{socket}");
    let flags = ok(&n1, "volume attach vm1 --num-queues 2 --print qemu");
    assert!(
        flags.contains(&format!("path={},reconnect=1", socket.trim()))
            && flags.contains("num-queues=2"),
        "{flags}"
    );
    let flags = ok(&n1, "volume attach vm1 --print cloud-hypervisor");
    assert!(flags.contains("vhost_user=true,socket="), "{flags}");

    let text = ok(&n2, "volume inspect default/vm1");
    for expected in [
        "Health:",
        "healthy",
        "n1 (serving)",
        "master",
        "replica",
        "RULE",
        "attach",
    ] {
        assert!(text.contains(expected), "{expected} in\n{text}");
    }
    let json: Value = serde_json::from_str(&ok(&n2, "volume inspect vm1 -o json")).unwrap();
    assert_eq!(json["master"]["node"], "n2");
    assert_eq!(json["attachment"]["num_queues"], 2);
    let yaml = ok(&n2, "volume inspect vm1 -o yaml");
    assert!(yaml.contains("\nhealth: healthy\n"), "{yaml}");

    assert_eq!(on(&n2, "volume rm vm1").0, 11);
    assert_eq!(on(&n2, "volume create vm1 --size 1GiB").0, 9);
    assert_eq!(on(&n2, "volume inspect vm2").0, 8);
    assert_eq!(on(&n2, "volume update vm1 --replicas 2").0, 11);
    assert_eq!(on(&n2, "volume create vm2 --size 1GiB --replicas 9").0, 10);
    let (code, out, err) = on(&n2, "volume create vm2 --size 1GiB --replicas 5");
    assert_eq!((code, out.as_str()), (11, ""));
    assert!(
        err.contains("6 copies need 6 nodes") && err.contains("hint: "),
        "{err}"
    );

    assert_eq!(
        ok(&n2, "volume update vm1 --failure-mode soft --label-rm env"),
        "default/vm1\n"
    );
}

#[test]
fn what_libvirt_is_told_is_a_disk_of_its_domain() {
    let lab = Lab::new();
    let [n1]: [Node; 1] = lab.nodes();
    ok(&n1, "volume create vm1 --size 1GiB");
    let socket = lab.dir.path().join("it's <here> & now.sock");
    let done = lockstep()
        .args([
            "--host",
            &format!("unix:{}", n1.run_dir.join("api.sock").display()),
        ])
        .args([
            "volume",
            "attach",
            "vm1",
            "--num-queues",
            "4",
            "--read-only",
            "--print",
            "libvirt",
        ])
        .arg("--socket")
        .arg(&socket)
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
    // Elements of a domain, as its owner pastes them (they fit the schema of libvirt 9).
    let text = format!(
        "<domain>{}</domain>",
        String::from_utf8(done.stdout).unwrap()
    );
    let domain = roxmltree::Document::parse(&text).unwrap();
    let at = |path: &str, attribute: &str| {
        let mut node = domain.root_element();
        for name in path.split('/') {
            let found = node.children().find(|c| c.has_tag_name(name));
            node = found.unwrap_or_else(|| panic!("no {path} in {text}"));
        }
        node.attribute(attribute).unwrap_or_default().to_string()
    };
    // Memory that another process can map,
    assert_eq!(at("memoryBacking/source", "type"), "memfd");
    assert_eq!(at("memoryBacking/access", "mode"), "shared");
    // and a disk of a back-end that is reached by that socket, and again when it was away.
    assert_eq!(at("disk", "type"), "vhostuser");
    assert_eq!(at("disk", "device"), "disk");
    assert_eq!(at("disk/driver", "queues"), "4");
    assert_eq!(at("disk/driver", "type"), "raw");
    assert_eq!(at("disk/source", "type"), "unix");
    assert_eq!(at("disk/source", "path"), socket.to_str().unwrap());
    assert_eq!(at("disk/source/reconnect", "enabled"), "yes");
    assert_eq!(at("disk/target", "bus"), "virtio");
    at("disk/readonly", "");
    assert!(socket.exists());
}

#[test]
fn what_is_no_fault_of_the_user_exits_with_13() {
    let lab = Lab::new();
    let [n1]: [Node; 1] = lab.nodes();
    ok(&n1, "volume create vm1 --size 1GiB");
    let error = HostError::Io("the disk is on fire".into());
    n1.host.levers.lock().unwrap().attach_error = Some(error);
    let (code, out, err) = on(&n1, "volume attach vm1");
    assert_eq!((code, out.as_str()), (13, ""), "{err}");
    assert!(err.contains("the disk is on fire"), "{err}");
    // Nor is a registry that is none.
    let broken = lab.dir.path().join("broken.db");
    std::fs::write(&broken, vec![7; 8192]).unwrap();
    let registry = format!("sqlite:{}", broken.display());
    let (data, run) = (lab.dir.path().join("d"), lab.dir.path().join("r"));
    let (data, run) = (data.to_str().unwrap(), run.to_str().unwrap());
    let done = output(&[
        "node",
        "--name",
        "n9",
        "--data-dir",
        data,
        "--run-dir",
        run,
        "--registry",
        &registry,
    ]);
    let err = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.code(), Some(13), "{err}");
    assert!(err.contains("broken.db"), "{err}");
}

#[test]
fn on_a_terminal_a_bar_is_drawn_over_itself_and_taken_away() {
    // Given a volume that is to get a replica, of which three quarters are there,
    let lab = Lab::new();
    let [n1, _n2]: [Node; 2] = lab.nodes();
    ok(&n1, "volume create vm1 --size 1GiB --master n1");
    ok(&n1, "volume attach vm1");
    // when that is waited for on a terminal (script(1) is one),
    let host = format!("unix:{}", n1.run_dir.join("api.sock").display());
    let binary = env!("CARGO_BIN_EXE_lockstep");
    let line = format!("{binary} --host {host} volume update vm1 --replicas 1");
    let log = lab.dir.path().join("screen");
    let mut terminal = Command::new("script")
        .args(["--quiet", "--return", "--flush", "--command", &line])
        .arg(&log)
        .env_remove("LOCKSTEP_HOST")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let copy = eventually("the replica is made", || {
        let record = n1.record("vm1");
        let new = record.present().find(|c| c.node.0 == "n2")?;
        lab.copy_on("n2", record.volume_id).map(|_| new.copy_id)
    });
    let sync = |remaining_bytes| SyncProgress {
        remaining_bytes,
        total_bytes: 4 << 20,
        bytes_per_second: 1 << 20,
        eta_seconds: None,
    };
    let screen = || std::fs::read_to_string(&log).unwrap_or_default();
    // then a bar is drawn, and drawn again over itself as it grows,
    for (left, drawn) in [
        (3 << 20, "\r\x1b[Kn2 [#####...............] 25 %"),
        (1 << 20, "\r\x1b[Kn2 [###############.....] 75 %"),
    ] {
        n1.host
            .levers
            .lock()
            .unwrap()
            .syncs
            .insert(copy, sync(left));
        eventually("the bar is drawn", || {
            screen().contains(drawn).then_some(())
        });
    }
    // and at the end nothing is left of it.
    n1.host.levers.lock().unwrap().syncs.clear();
    n1.settle("vm1", &[copy]);
    assert!(terminal.wait().unwrap().success(), "{}", screen());
    let screen = screen();
    let bars = screen.split("default/vm1").next().unwrap();
    assert!(
        !bars.contains('\n') || bars.starts_with("Script started"),
        "{screen:?}"
    );
    assert!(bars.ends_with("\r\x1b[K"), "{screen:?}");
}

#[test]
fn volumes_are_listed_by_namespace_and_label() {
    let lab = Lab::new();
    let [n1]: [Node; 1] = lab.nodes();
    ok(&n1, "volume create a --size 1GiB --label env=prod");
    ok(&n1, "volume create b --size 1GiB --label env=dev");
    ok(&n1, "volume create -n other c --size 1GiB --label env=prod");
    let names = |line: &str| -> Vec<String> {
        let table = ok(&n1, line);
        table
            .lines()
            .skip(1)
            .map(|l| l.split_whitespace().next().unwrap().into())
            .collect()
    };
    assert_eq!(names("volume ls"), ["default/a", "default/b"]);
    assert_eq!(names("volume ls -A"), ["default/a", "default/b", "other/c"]);
    assert_eq!(names("volume ls -n other"), ["other/c"]);
    assert_eq!(names("volume ls -A -l env==prod"), ["default/a", "other/c"]);
    assert_eq!(names("volume ls -l !env"), Vec::<String>::new());
    let json: Value = serde_json::from_str(&ok(&n1, "volume ls -A -o json")).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 3);
}

#[test]
fn nodes_and_the_cluster_are_shown() {
    let lab = Lab::new();
    let [n1, n2]: [Node; 2] = lab.nodes();
    ok(&n1, "volume create a --size 1GiB --replicas 1 --master n2");
    let table = ok(&n1, "node ls");
    let columns: Vec<&str> = table.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(
        columns,
        [
            "NAME",
            "ADDRESS",
            "HEALTH",
            "SCHEDULER",
            "VOLUMES",
            "CAPACITY",
            "USED",
            "VERSION"
        ]
    );
    assert!(
        table.lines().nth(2).unwrap().contains("M: 1, R: 0"),
        "{table}"
    );
    assert!(
        table.contains("100 GiB") && table.contains("50.0%"),
        "{table}"
    );
    let node = ok(&n1, "node inspect n2");
    assert!(
        node.contains("default/a") && node.contains("4 KiB"),
        "{node}"
    );
    assert_eq!(on(&n1, "node inspect n9").0, 8);
    assert!(ok(&n1, "cluster status").contains("Nothing needs attention."));
    n2.stop();
    let status = ok(&n1, "cluster status");
    assert!(
        status.contains("node n2 is offline") && status.contains("(1 online)"),
        "{status}"
    );
}

#[test]
fn events_are_listed_and_followed() {
    let lab = Lab::new();
    let [n1, n2]: [Node; 2] = lab.nodes();
    ok(&n1, "volume create vm1 --size 1GiB");
    let host = format!("unix:{}", n1.run_dir.join("api.sock").display());
    let mut follower = lockstep()
        .args([
            "--host", &host, "events", "-f", "--volume", "vm1", "-o", "json",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    assert_eq!(
        (next()["to"].as_str(), next()["to"].as_str()),
        (Some("creating"), Some("clean"))
    );
    // What happens on another node is followed as well.
    ok(&n2, "volume attach vm1");
    let mut seen = Vec::new();
    while !seen.contains(&"attached".to_string()) {
        let event = next();
        assert_eq!(event["volume"], "default/vm1");
        seen.push(event["to"].as_str().unwrap().to_string());
    }
    follower.kill().unwrap();
    follower.wait().unwrap();

    let table = ok(&n1, "events --volume vm1");
    assert!(table.starts_with("TIME"), "{table}");
    assert_eq!(table.lines().count(), 1 + 5, "{table}");
    let all: Value = serde_json::from_str(&ok(&n2, "events -o json")).unwrap();
    let times: Vec<&str> = all
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["time"].as_str().unwrap())
        .collect();
    assert!(times.is_sorted());
}

#[test]
fn async_returns_before_the_work_is_done() {
    let lab = Lab::new();
    let [n1]: [Node; 1] = lab.nodes();
    ok(&n1, "volume create vm1 --size 1GiB --async");
    eventually("it is created", || {
        (n1.volume("vm1")["state"] == "clean").then_some(())
    });
    n1.host.levers.lock().unwrap().attach_error = Some(HostError::Busy("not yet".into()));
    ok(&n1, "volume attach vm1 --async");
    n1.host.levers.lock().unwrap().attach_error = None;
    eventually("it is served", || {
        (n1.volume("vm1")["health"] == "healthy"
            && n1.volume("vm1")["attachment"]["phase"] == "serving")
            .then_some(())
    });
    ok(&n1, "volume detach vm1 --async");
    eventually("it is released", || {
        n1.volume("vm1")["attachment"].is_null().then_some(())
    });
    ok(&n1, "volume rm vm1");
    assert_eq!(on(&n1, "volume rm vm1").0, 8);
}
