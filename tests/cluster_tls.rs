//! TLS between nodes, with certificates as docs/OPERATIONS.md makes them: the commands there are what runs here.

mod cluster_support;

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use cluster_support::client::{Disk, KIB, Load, MIB, Plan};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, eventually, lockstep};
use lockstep::replication::ids::{BootId, ClusterId, CopyId, Instance, NodeName, VolumeId};
use lockstep::wire::hello::{Answer, Hello, Purpose, Reason, VERSIONS};
use serde_json::Value;

const SIZE: u64 = 32 * MIB as u64;

/// The commands of docs/OPERATIONS.md: the authority's, and one node's.
fn documented() -> [String; 2] {
    let text = include_str!("../docs/OPERATIONS.md");
    let section = text.split("## TLS between nodes").nth(1).unwrap();
    let mut commands = Vec::<String>::new();
    let mut goes_on = false;
    for line in section.split("\n## ").next().unwrap().lines() {
        let Some(line) = line.strip_prefix("    ") else {
            continue;
        };
        match goes_on {
            true => commands.last_mut().unwrap().push_str(&format!("\n{line}")),
            false => commands.push(line.into()),
        }
        goes_on = line.ends_with('\\');
    }
    commands.retain(|command| command.starts_with("openssl"));
    commands
        .try_into()
        .expect("one for the authority, one for a node")
}

fn shell(command: &str, dir: &Path) {
    let output = Command::new("sh")
        .args(["-ec", command])
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// An authority, and directories with what nodes need.
struct Authority(tempfile::TempDir);

impl Authority {
    fn new() -> Authority {
        let dir = tempfile::tempdir().unwrap();
        shell(&documented()[0], dir.path());
        Authority(dir)
    }

    /// A `--tls-dir` with a certificate for `name`.
    fn directory(&self, name: &str) -> PathBuf {
        shell(&documented()[1].replace("n1", name), self.0.path());
        let dir = self.0.path().join(name);
        fs::create_dir(&dir).unwrap();
        fs::copy(self.0.path().join("ca.pem"), dir.join("ca.pem")).unwrap();
        for file in ["node.pem", "node-key.pem"] {
            fs::rename(self.0.path().join(file), dir.join(file)).unwrap();
        }
        dir
    }
}

fn tls_dir(dir: &Path) -> Vec<String> {
    vec!["--tls-dir".into(), dir.display().to_string()]
}

/// Nodes n1 … with certificates; `more` are arguments of node n2.
fn start(
    authority: &Authority,
    nodes: usize,
    mut more: impl FnMut(&Cluster) -> Vec<String>,
) -> Cluster {
    let mut cluster = Cluster::empty(Path::new("/dev/shm"));
    for n in 1..=nodes {
        let mut extra = tls_dir(&authority.directory(&format!("n{n}")));
        if n == 2 {
            extra.extend(more(&cluster));
        }
        cluster.start_node_with(n, &cluster.data_dir(n), &extra);
    }
    cluster.know_each_other();
    cluster
}

/// What went over the wire to a node, both ways.
type Heard = Arc<Mutex<Vec<u8>>>;

/// Stands between the others and node n2, and listens.
fn eavesdrop(cluster: &Cluster) -> (Vec<String>, Heard) {
    let door = TcpListener::bind(format!("{}:0", cluster.ip(102))).unwrap();
    let at = door.local_addr().unwrap().to_string();
    let target = cluster.listen(2);
    let heard = Heard::default();
    let all = Arc::clone(&heard);
    std::thread::spawn(move || {
        for theirs in door.incoming().flatten() {
            let Ok(ours) = TcpStream::connect(&target) else {
                continue;
            };
            for (mut from, mut to) in [(&theirs, &ours), (&ours, &theirs)]
                .map(|(from, to)| (from.try_clone().unwrap(), to.try_clone().unwrap()))
            {
                let all = Arc::clone(&all);
                std::thread::spawn(move || {
                    let mut bytes = vec![0; 64 * KIB];
                    while let Ok(n @ 1..) = from.read(&mut bytes) {
                        all.lock().unwrap().extend(&bytes[..n]);
                        if to.write_all(&bytes[..n]).is_err() {
                            break;
                        }
                    }
                    let _ = to.shutdown(Shutdown::Write);
                });
            }
        }
    });
    (vec!["--advertise".into(), at], heard)
}

/// Has a guest write words, and says whether they were heard on the way to node n2, as was everything else.
fn words_are_heard(cluster: &Cluster, heard: &Heard) -> bool {
    let words = b"what the guest wrote".repeat(200);
    let create = "--size 32MiB --replicas 1 --master n1 --label lockstep.io/nocompress=true";
    let socket = cluster.serve("words", create, "--node n1");
    let mut disk = Disk::open(&socket, 1, 1);
    disk.buffer(0, 4 * KIB)[..words.len()].copy_from_slice(&words);
    disk.write(0, 0, 4 * KIB);
    assert_eq!(disk.finish(), 0);
    let heard = heard.lock().unwrap();
    assert!(
        heard.len() > 4 * KIB,
        "the copy on n2 was written another way"
    );
    heard.windows(words.len()).any(|part| part == words)
}

#[test]
fn what_travels_between_nodes_is_encrypted_and_nothing_is_lost() {
    // Given one who listens on the way to a node, and hears everything while nodes have no certificates,
    let mut plain = Cluster::empty(Path::new("/dev/shm"));
    let (extra, heard) = eavesdrop(&plain);
    plain.start_node(1);
    plain.start_node_with(2, &plain.data_dir(2), &extra);
    plain.know_each_other();
    assert!(words_are_heard(&plain, &heard));
    drop(plain);
    // when nodes have them, then nothing is heard,
    let authority = Authority::new();
    let mut heard = None;
    let mut cluster = start(&authority, 3, |cluster| {
        let (extra, ear) = eavesdrop(cluster);
        heard = Some(ear);
        extra
    });
    let heard = heard.unwrap();
    assert!(!words_are_heard(&cluster, &heard));
    // and under a load of all sizes, with a node that dies and comes back, all is as it was without.
    let socket = cluster.serve("vm1", "--size 32MiB --replicas 2 --master n1", "--node n1");
    let load = Load::start(&socket, Plan::mixed(), Oracle::new(SIZE));
    cluster.kill(3);
    cluster.wait_for(1, "vm1", "misses a copy", |v| v["health"] == "degraded");
    load.goes_on();
    cluster.start_node(3);
    cluster.wait_for(1, "vm1", "is healthy", |v| v["health"] == "healthy");
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    // Replacing the program leaves nobody's connections behind, either.
    let view = cluster.json(1, "node upgrade");
    assert_eq!(view["state"], "done", "{view:#}");
    cluster.wait_for(1, "vm1", "is healthy", |v| v["health"] == "healthy");
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
}

/// Greets node n as node `name`, without TLS.
fn greet(cluster: &Cluster, n: usize, name: &str) -> Answer {
    let mut hello = Vec::new();
    Hello {
        versions: VERSIONS,
        features: 0,
        cluster: ClusterId([0; 16]),
        node: NodeName(name.into()),
        boot_id: BootId([1; 16]),
        instance: Instance([2; 16]),
        volume: VolumeId([3; 16]),
        copy: CopyId([4; 16]),
        purpose: Purpose::Foreground,
    }
    .encode(&mut hello);
    let mut stream = TcpStream::connect(cluster.listen(n)).unwrap();
    stream.write_all(&hello).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    Answer::decode(&answer).unwrap().expect("an answer").0
}

#[test]
fn nobody_gets_in_without_a_certificate_of_the_cluster_for_its_name() {
    // Given nodes with certificates,
    let authority = Authority::new();
    let mut cluster = start(&authority, 2, |_| Vec::new());
    let socket = cluster.serve("vm1", "--size 32MiB --replicas 1 --master n1", "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    // when somebody greets one of them without TLS, then it is told why it gets nothing.
    match greet(&cluster, 1, "n2") {
        Answer::Refusal(refusal) => {
            assert_eq!(refusal.reason, Reason::Unproven);
            assert!(
                refusal.text.contains("start node n2 with --tls-dir"),
                "{refusal}"
            );
        }
        other => panic!("{other:?}"),
    }
    // A node with a certificate of another authority, one with none, and one that has another node's, which does not start:
    let stranger = Authority::new();
    let other = tls_dir(&stranger.directory("n3"));
    let mut arguments = cluster.node_arguments(3, &cluster.data_dir(3));
    let mistaken = authority.directory("n4");
    arguments.extend(tls_dir(&mistaken));
    let done = cluster.node_that_must_not_start(&arguments);
    done.refused(10, &["--tls-dir", "not of node n3", "DNS:n3"]);
    let doctor = |name: &str| {
        let mut command = lockstep();
        command
            .args(["doctor", "--name", name, "-o", "json"])
            .args(tls_dir(&mistaken));
        let checks: Value = serde_json::from_slice(&command.output().unwrap().stdout).unwrap();
        let all = checks.as_array().unwrap();
        all.iter().find(|c| c["check"] == "certificate").unwrap()["outcome"].clone()
    };
    assert_eq!([doctor("n3"), doctor("n4")], ["fail", "ok"]);
    let key = mistaken.join("node-key.pem");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let done = cluster.node_that_must_not_start(&arguments);
    done.refused(10, &["node-key.pem", "chmod 600"]);
    for (extra, said) in [
        (other, "no TLS: invalid peer certificate"),
        (
            Vec::new(),
            "it ended the TLS handshake: does it run with --tls-dir",
        ),
    ] {
        cluster.start_node_with(3, &cluster.data_dir(3), &extra);
        // nobody reaches it, and it is said why.
        let cut = format!("n1 and n3 do not reach each other ({said}");
        eventually(&format!("n1 says {cut:?}"), || {
            let status = cluster.json(1, "cluster status").to_string();
            status.contains(&cut).then_some(())
        });
        cluster.kill(3);
    }
    // Meanwhile nothing happened to those that believe each other.
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    assert_eq!(cluster.volume(1, "vm1")["health"], "healthy");
}

#[test]
fn a_running_cluster_changes_to_tls_node_by_node() {
    // Given a cluster without TLS whose nodes have their flags in files, under load,
    let authority = Authority::new();
    let mut cluster = Cluster::empty(Path::new("/dev/shm"));
    let flags = |n: usize| authority.0.path().join(format!("n{n}.toml"));
    for n in 1..=3 {
        fs::write(flags(n), "").unwrap();
        let extra = ["--config".to_string(), flags(n).display().to_string()];
        cluster.start_node_with(n, &cluster.data_dir(n), &extra);
    }
    cluster.know_each_other();
    let socket = cluster.serve("vm1", "--size 32MiB --replicas 2 --master n1", "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    let replace = |n: usize| {
        let view = cluster.json(n, "node upgrade");
        assert_eq!(view["state"], "done", "{view:#}");
        cluster.wait_for(1, "vm1", "is healthy", |v| v["health"] == "healthy");
        load.goes_on();
    };
    // a file that does not fit costs nothing,
    let dirs = [1, 2, 3].map(|n| authority.directory(&format!("n{n}")));
    let line = |dir: &Path| format!("tls-dir = \"{}\"\n", dir.display());
    fs::write(flags(1), line(&dirs[1])).unwrap();
    cluster
        .run(1, "node upgrade")
        .refused(11, &["not of node n1"]);
    // when each node is told to take both, then each to take TLS alone,
    for both in ["insecure-plaintext = true\n", ""] {
        for n in [2, 1, 3] {
            fs::write(flags(n), line(&dirs[n - 1]) + both).unwrap();
            replace(n);
        }
    }
    // then plain text is refused, and the guest never saw any of it.
    assert!(matches!(greet(&cluster, 2, "n1"), Answer::Refusal(r) if r.reason == Reason::Unproven));
    assert_eq!(load.finish().failed, 0);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
}
