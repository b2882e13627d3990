//! A real guest on real nodes: QEMU boots the image of `qemu/build-guest` on a volume's socket, runs a workload, and its
//! verdict on the console is the test's. `scripts/test` installs QEMU and builds the image.
//!
//! `LOCKSTEP_BIN` runs the same tests against another binary, an installed one for instance.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Nothing here takes this long unless it hangs; generous, since guests are emulated and tests share processors.
const PATIENCE: Duration = Duration::from_secs(240);

/// A child process that does not outlive the test.
struct Process(Child);

impl Process {
    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Nodes n1, n2, … on 127.0.0.1, with one registry, in a directory of their own. Dropped, it kills them.
struct Cluster {
    nodes: Vec<Process>,
    dir: tempfile::TempDir,
}

impl Cluster {
    fn start(nodes: usize) -> Cluster {
        let mut cluster = Cluster {
            nodes: Vec::new(),
            dir: tempfile::tempdir().unwrap(),
        };
        for n in 1..=nodes {
            let (data, run) = (
                cluster.node_dir(n).join("data"),
                cluster.node_dir(n).join("run"),
            );
            fs::create_dir_all(&data).unwrap();
            fs::create_dir_all(&run).unwrap();
            // Both are bound at once, so they differ; they are free again when the node binds them.
            let ports = [0; 2].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
            let [listen, http] = ports
                .each_ref()
                .map(|port| port.local_addr().unwrap().to_string());
            drop(ports);
            let log = File::create(cluster.node_dir(n).join("log")).unwrap();
            let child = Command::new(binary())
                .args([
                    "node",
                    "--name",
                    &format!("n{n}"),
                    "--listen",
                    &listen,
                    "--http",
                    &http,
                ])
                .arg("--data-dir")
                .arg(data)
                .arg("--run-dir")
                .arg(run)
                .arg("--registry")
                .arg(format!(
                    "sqlite:{}",
                    cluster.dir.path().join("registry.db").display()
                ))
                .stdin(Stdio::null())
                .stdout(log.try_clone().unwrap())
                .stderr(log)
                .spawn()
                .unwrap();
            cluster.nodes.push(Process(child));
            cluster.wait(&format!("node n{n} to answer"), |cluster| {
                cluster.try_ctl(n, &["node", "ls"]).is_ok()
            });
        }
        cluster
    }

    fn node_dir(&self, n: usize) -> PathBuf {
        self.dir.path().join(format!("n{n}"))
    }

    /// The command line on node n: what it printed, or its complaint.
    fn try_ctl(&self, n: usize, arguments: &[&str]) -> Result<String, String> {
        let output = Command::new(binary())
            .arg("--host")
            .arg(format!(
                "unix:{}",
                self.node_dir(n).join("run/api.sock").display()
            ))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    fn ctl(&self, n: usize, arguments: &[&str]) -> String {
        self.try_ctl(n, arguments)
            .unwrap_or_else(|error| panic!("{arguments:?}: {error}{}", self.logs()))
    }

    /// Creates and attaches a volume on n1; gives its socket.
    fn serve(&self, volume: &str, replicas: usize) -> PathBuf {
        let replicas = replicas.to_string();
        self.ctl(
            1,
            &[
                "volume",
                "create",
                volume,
                "--size",
                "512MiB",
                "--replicas",
                &replicas,
                "--master",
                "n1",
            ],
        );
        self.ctl(1, &["volume", "attach", volume, "--node", "n1"]);
        let socket = self
            .node_dir(1)
            .join(format!("run/vhost/default/{volume}.sock"));
        self.wait("the volume's socket", |_| socket.exists());
        self.wait("a healthy volume", |cluster| {
            cluster.says(volume, "healthy")
        });
        socket
    }

    fn says(&self, volume: &str, word: &str) -> bool {
        self.ctl(1, &["volume", "inspect", volume])
            .split(|c: char| !c.is_ascii_alphanumeric())
            .any(|found| found == word)
    }

    fn copy(&self, n: usize) -> PathBuf {
        let volumes = self.node_dir(n).join("data/volumes");
        let mut found = fs::read_dir(&volumes)
            .unwrap()
            .map(|entry| entry.unwrap().path().join("data"));
        let data = found
            .next()
            .unwrap_or_else(|| panic!("no volume in {}", volumes.display()));
        assert!(
            found.next().is_none(),
            "more than one volume in {}",
            volumes.display()
        );
        data
    }

    fn wait(&self, what: &str, mut reached: impl FnMut(&Cluster) -> bool) {
        let begin = Instant::now();
        while !reached(self) {
            assert!(
                begin.elapsed() < PATIENCE,
                "gave up waiting for {what}{}",
                self.logs()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The end of each node's log and of the guest's console, for a failure's message.
    fn logs(&self) -> String {
        let mut files: Vec<PathBuf> = (1..=self.nodes.len())
            .map(|n| self.node_dir(n).join("log"))
            .collect();
        files.push(self.dir.path().join("console"));
        let mut text = String::new();
        for file in files {
            let lines = read(&file);
            let lines: Vec<&str> = lines.lines().collect();
            text += &format!(
                "\n--- {}\n{}",
                file.display(),
                lines[lines.len().saturating_sub(15)..].join("\n")
            );
        }
        text
    }

    /// Boots a guest on a socket with a workload and its parameters.
    fn boot(&self, socket: &Path, workload: &str, settings: &[&str]) -> Process {
        self.boot_with(socket, workload, settings, &[])
    }

    /// The same with more arguments of `qemu/run-guest`.
    fn boot_with(
        &self,
        socket: &Path,
        workload: &str,
        settings: &[&str],
        arguments: &[&str],
    ) -> Process {
        let mut command = Command::new(repository().join("qemu/run-guest"));
        command
            .arg("--socket")
            .arg(socket)
            .args(["--run", workload]);
        for setting in settings {
            command.args(["--set", setting]);
        }
        command
            .arg("--console")
            .arg(self.dir.path().join("console"))
            .args(arguments);
        Process(
            command
                .stdin(Stdio::null())
                .spawn()
                .expect("qemu/run-guest must run; see scripts/test"),
        )
    }

    fn console(&self) -> String {
        read(&self.dir.path().join("console"))
    }

    fn heartbeats(&self) -> usize {
        self.console()
            .lines()
            .filter(|line| line.starts_with("HEARTBEAT"))
            .count()
    }

    /// Waits for the workload's verdict, which must be good.
    fn expect_guest_ok(&self, guest: &mut Process) {
        self.wait("the guest's verdict", |cluster| {
            let console = cluster.console();
            assert!(
                !console.contains("GUEST-FAIL") && !console.contains("Kernel panic"),
                "{}",
                cluster.logs()
            );
            console.contains("GUEST-OK") || guest.0.try_wait().unwrap().is_some()
        });
        assert!(
            self.console().contains("GUEST-OK"),
            "the guest ended without a verdict{}",
            self.logs()
        );
    }
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn binary() -> PathBuf {
    std::env::var_os("LOCKSTEP_BIN")
        .map_or_else(|| env!("CARGO_BIN_EXE_lockstep").into(), PathBuf::from)
}

fn read(file: &Path) -> String {
    String::from_utf8_lossy(&fs::read(file).unwrap_or_default()).into_owned()
}

#[test]
fn a_guest_reads_back_what_it_wrote_past_its_page_cache() {
    // Given one node and a volume without replicas,
    let cluster = Cluster::start(1);
    let socket = cluster.serve("raw", 0);
    // when a guest stamps blocks with O_DIRECT and overwrites some,
    let mut guest = cluster.boot(&socket, "stamp", &["blocks=64", "rounds=1"]);
    // then it reads the last stamp of each, and its kernel has seen no error.
    cluster.expect_guest_ok(&mut guest);
}

#[test]
fn a_guest_does_not_notice_the_death_of_a_replica() {
    // Given three nodes, a volume with two replicas, and a guest that writes files to it,
    let mut cluster = Cluster::start(3);
    let socket = cluster.serve("files", 2);
    let mut guest = cluster.boot(&socket, "demo", &["seconds=15"]);
    cluster.wait("the guest to write", |cluster| cluster.heartbeats() >= 10);
    // when a node that only holds a replica is killed,
    cluster.nodes[2].kill();
    let before = cluster.heartbeats();
    // then the guest goes on, finds every file intact, and its kernel has seen no error;
    cluster.expect_guest_ok(&mut guest);
    assert!(
        cluster.heartbeats() > before,
        "the guest wrote nothing after the loss{}",
        cluster.logs()
    );
    // the volume says that it is degraded;
    assert!(
        cluster.says("files", "degraded"),
        "{}{}",
        cluster.ctl(1, &["volume", "inspect", "files"]),
        cluster.logs()
    );
    // and the copies that are left are the same, byte by byte.
    cluster.wait("the guest to switch off", |_| {
        guest.0.try_wait().unwrap().is_some()
    });
    cluster.ctl(1, &["volume", "detach", "files"]);
    let same = Command::new("cmp")
        .arg(cluster.copy(1))
        .arg(cluster.copy(2))
        .output()
        .unwrap();
    assert!(
        same.status.success(),
        "{}",
        String::from_utf8_lossy(&same.stdout)
    );
}

#[test]
fn a_guest_without_indirect_tables_has_room_in_its_ring_for_the_largest_request() {
    for off in [true, false] {
        // Given a guest whose ring has QEMU's 128 entries, and whose requests must fit into them as they are, or need not,
        let cluster = Cluster::start(1);
        let socket = cluster.serve("large", 0);
        let how = if off {
            "indirect_desc=off"
        } else {
            "indirect_desc=on"
        };
        let arguments = ["--mem", "192", "--property", how];
        // when it asks for as much at once as the disk allows, in as many pieces as that can have,
        let mut guest = cluster.boot_with(&socket, "large", &["mib=16"], &arguments);
        // then it is answered: one that does not fit would be tried again for ever.
        cluster.expect_guest_ok(&mut guest);
        let console = cluster.console();
        let speeds = console.lines().filter(|l| l.starts_with("LARGE"));
        speeds.for_each(|line| println!("{how}: {line}"));
    }
}

#[test]
fn a_guest_gives_space_back_on_every_copy() {
    // Given a volume with two replicas,
    let cluster = Cluster::start(3);
    let socket = cluster.serve("thin", 2);
    // when a guest writes to it, discards all of it, makes a file system, writes a file, removes it and trims,
    let mut guest = cluster.boot(&socket, "zeroes", &["mib=48"]);
    cluster.expect_guest_ok(&mut guest);
    cluster.wait("the guest to switch off", |_| {
        guest.0.try_wait().unwrap().is_some()
    });
    // then its kernel knew the limits,
    let limits =
        "discard_max_bytes=67108864 discard_granularity=4096 write_zeroes_max_bytes=67108864";
    assert!(cluster.console().contains(limits), "{}", cluster.logs());
    // no copy takes the space of what was written,
    for n in 1..=3 {
        let data = fs::metadata(cluster.copy(n)).unwrap();
        let takes = std::os::unix::fs::MetadataExt::blocks(&data) * 512;
        assert!(
            takes < 32 << 20,
            "the copy on n{n} takes {takes} bytes{}",
            cluster.logs()
        );
    }
    // and the copies are the same.
    cluster.ctl(1, &["volume", "detach", "thin"]);
    for n in 2..=3 {
        let same = Command::new("cmp")
            .arg(cluster.copy(1))
            .arg(cluster.copy(n))
            .output()
            .unwrap();
        assert!(
            same.status.success(),
            "{}",
            String::from_utf8_lossy(&same.stdout)
        );
    }
}
