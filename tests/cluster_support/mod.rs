//! Clusters of real node processes on loopback addresses of their own, for tests that see only what users see: the
//! command line, sockets, files and logs. [`client`] is the virtual machine's side.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod client;
pub mod disks;
pub mod net;
pub mod oracle;
pub mod qemu;
pub mod schedule;
pub mod sick;
pub mod vm;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use net::Network;
use rustix::fs::{FlockOperation, flock};
use serde_json::Value;

/// Generous, since tests share processors: only something broken takes this long.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// Loopback blocks that can be in use at once on one machine.
const BLOCKS: u16 = 2000;
/// Last lines of each node's log that a failing test shows.
const LOG_LINES: usize = 40;

/// Waits until `check` gives something.
pub fn eventually<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(begin.elapsed() < PATIENCE, "gave up waiting until {what}");
        std::thread::sleep(Duration::from_millis(30));
    }
}

/// The time of day as the nodes' logs tell it.
pub fn clock(at: SystemTime) -> String {
    let ms = at
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_millis();
    let (seconds, ms) = (ms / 1000, ms % 1000);
    let (h, m, s) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{h:02}:{m:02}:{s:02}.{ms:03}")
}

/// Addresses 127.A.B.1 … 127.A.B.250 that no other cluster has: whoever holds the lock on the block's file has the block.
struct Block {
    a: u16,
    b: u16,
    _lock: File,
}

impl Block {
    fn claim() -> Block {
        for number in 0..BLOCKS {
            let path = format!("/tmp/lockstep-itest-{number}.lock");
            let lock = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)
                .unwrap_or_else(|e| panic!("{path}: {e}"));
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
                return Block {
                    a: 100 + number / 200,
                    b: 1 + number % 200,
                    _lock: lock,
                };
            }
        }
        panic!("all {BLOCKS} loopback blocks are in use");
    }
}

/// One node: where its things are, and its process while it runs.
struct Node {
    data: PathBuf,
    run: PathBuf,
    extra: Vec<String>,
    child: Option<Child>,
}

/// What a command said.
#[derive(Debug)]
pub struct Done {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Done {
    /// The command failed with this exit code, printed nothing, and its complaint has all these parts.
    #[track_caller]
    pub fn refused(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, code, "{self:?}");
        assert_eq!(self.out, "", "{self:?}");
        for part in parts {
            assert!(self.err.contains(part), "no {part:?} in {self:?}");
        }
    }
}

/// Nodes n1, n2, … with one registry. Dropped, it kills them; dropped by a failing test, it shows their logs.
pub struct Cluster {
    block: Block,
    pub dir: tempfile::TempDir,
    nodes: BTreeMap<usize, Node>,
    /// Their own, if they have one. After the processes in it have gone, so is it.
    pub network: Option<Network>,
    /// `--registry` when it is not the file in `dir`.
    pub registry_at: Option<String>,
    /// What nodes run instead of the binary under test.
    pub programs: BTreeMap<usize, PathBuf>,
    /// Added to the last number of the nodes' addresses when they are started from now on.
    pub moved_by: usize,
    /// Nodes that are where another number's node was.
    pub at: BTreeMap<usize, usize>,
    /// Nodes that are started from now on are known to others by their machines' names, and by nothing else.
    pub by_name: bool,
    /// Nodes that are started from now on are alone on their machine: by its loopback address.
    pub alone: bool,
}

impl Cluster {
    /// Started nodes n1 … on the disk that holds /tmp.
    pub fn start(nodes: usize) -> Cluster {
        Cluster::start_in(Path::new("/tmp"), nodes)
    }

    /// The same below another directory.
    pub fn start_in(parent: &Path, nodes: usize) -> Cluster {
        let mut cluster = Cluster::empty(parent);
        for n in 1..=nodes {
            cluster.start_node(n);
        }
        cluster.know_each_other();
        cluster
    }

    /// No node yet.
    pub fn empty(parent: &Path) -> Cluster {
        Cluster {
            block: Block::claim(),
            dir: tempfile::Builder::new()
                .prefix("lockstep-itest-")
                .tempdir_in(parent)
                .unwrap(),
            nodes: BTreeMap::new(),
            network: None,
            registry_at: None,
            programs: BTreeMap::new(),
            moved_by: 0,
            at: BTreeMap::new(),
            by_name: false,
            alone: false,
        }
    }

    /// No node yet, and places for this many on a network of their own, in which ways between them can be cut.
    pub fn empty_on_a_network(parent: &Path, places: usize) -> Cluster {
        let mut cluster = Cluster::empty(parent);
        let net = format!("127.{}.{}", cluster.block.a, cluster.block.b);
        cluster.network = Some(Network::new(&net, places));
        cluster
    }

    /// The same with addresses that are no loopback addresses, as machines have them. The registry must be etcd.
    pub fn empty_on_machines(parent: &Path, places: usize) -> Cluster {
        let mut cluster = Cluster::empty(parent);
        let net = format!("10.{}.{}", cluster.block.a, cluster.block.b);
        cluster.network = Some(Network::new(&net, places));
        cluster
    }

    /// Nodes with a network of their own.
    pub fn start_on_a_network(parent: &Path, nodes: usize) -> Cluster {
        let mut cluster = Cluster::empty_on_a_network(parent, nodes);
        for n in 1..=nodes {
            cluster.start_node(n);
        }
        cluster.know_each_other();
        cluster
    }

    /// Every node sees every running node online.
    pub fn know_each_other(&self) {
        for n in self.running() {
            eventually(&format!("n{n} sees all nodes online"), || {
                let done = self.run(n, "node ls -o json");
                let list: Value = serde_json::from_str(&done.out).ok()?;
                let online = list.as_array()?.iter().filter(|v| v["health"] == "online");
                (online.count() == self.running().len()).then_some(())
            });
        }
    }

    fn running(&self) -> Vec<usize> {
        let alive = self.nodes.iter().filter(|(_, node)| node.child.is_some());
        alive.map(|(n, _)| *n).collect()
    }

    fn place(&self, n: usize) -> usize {
        self.at.get(&n).copied().unwrap_or(n)
    }

    /// 127.A.B.n, or the network's own.
    pub fn ip(&self, n: usize) -> String {
        let n = self.place(n);
        if self.alone {
            return "127.0.0.1".into();
        }
        match &self.network {
            Some(network) => network.address(n),
            None => {
                let last = n + self.moved_by;
                format!("127.{}.{}.{last}", self.block.a, self.block.b)
            }
        }
    }

    /// Where node n takes replication connections.
    pub fn listen(&self, n: usize) -> String {
        format!("{}:5703", self.ip(n))
    }

    pub fn node_dir(&self, n: usize) -> PathBuf {
        self.dir.path().join(format!("n{n}"))
    }

    pub fn data_dir(&self, n: usize) -> PathBuf {
        self.nodes
            .get(&n)
            .map_or_else(|| self.node_dir(n).join("data"), |node| node.data.clone())
    }

    pub fn run_dir(&self, n: usize) -> PathBuf {
        self.node_dir(n).join("run")
    }

    pub fn registry(&self) -> PathBuf {
        self.dir.path().join("registry.db")
    }

    /// The arguments of `lockstep node` for node n with this data directory.
    pub fn node_arguments(&self, n: usize, data: &Path) -> Vec<String> {
        let mut arguments: Vec<String> = [
            "node".to_string(),
            "--name".into(),
            format!("n{n}"),
            "--listen".into(),
            self.listen(n),
            "--http".into(),
            match self.by_name {
                true => "0.0.0.0:5705".into(),
                false => format!("{}:5705", self.ip(n)),
            },
            "--data-dir".into(),
            data.display().to_string(),
            "--run-dir".into(),
            self.run_dir(n).display().to_string(),
            "--registry".into(),
            match &self.registry_at {
                Some(location) => location.clone(),
                None => format!("sqlite:{}", self.registry().display()),
            },
        ]
        .into();
        if self.by_name {
            arguments.extend(["--advertise".into(), format!("{}:5703", machine(n))]);
        }
        if !self.ip(n).starts_with("127.") {
            arguments.push("--insecure-plaintext".into());
        }
        arguments
    }

    /// Starts node n (again), with the same directories as before, and waits until it answers.
    pub fn start_node(&mut self, n: usize) {
        let data = self.data_dir(n);
        let extra = self.nodes.get(&n).map(|node| node.extra.clone());
        self.start_node_with(n, &data, &extra.unwrap_or_default());
    }

    /// Starts node n with a data directory of the test's choice and more arguments.
    pub fn start_node_with(&mut self, n: usize, data: &Path, extra: &[String]) {
        self.spawn_node_with(n, data, extra);
        eventually(&format!("n{n} answers"), || self.answers(n).then_some(()));
    }

    /// Starts node n again and does not wait for it.
    pub fn spawn_node(&mut self, n: usize) {
        let data = self.data_dir(n);
        let extra = self.nodes.get(&n).map(|node| node.extra.clone());
        self.spawn_node_with(n, &data, &extra.unwrap_or_default());
    }

    fn spawn_node_with(&mut self, n: usize, data: &Path, extra: &[String]) {
        let run = self.run_dir(n);
        fs::create_dir_all(data).unwrap();
        fs::create_dir_all(&run).unwrap();
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path(n))
            .unwrap();
        let program = self.programs.get(&n).cloned().unwrap_or_else(binary);
        let mut command = match &self.network {
            Some(network) => network.command(self.place(n), &program),
            None => Command::new(program),
        };
        command
            .args(self.node_arguments(n, data))
            .args(extra)
            .env_remove("LOCKSTEP_HOST")
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let child = command.spawn().unwrap();
        let node = Node {
            data: data.into(),
            run,
            extra: extra.to_vec(),
            child: Some(child),
        };
        let old = self.nodes.insert(n, node);
        assert!(
            old.is_none_or(|node| node.child.is_none()),
            "n{n} ran already"
        );
    }

    /// The command line reaches node n, which must not have ended.
    pub fn answers(&mut self, n: usize) -> bool {
        if let Some(status) = self.child(n).try_wait().unwrap() {
            panic!("n{n} ended with {status} before it answered");
        }
        self.run(n, "node ls").code == 0
    }

    /// Runs `lockstep node` with these arguments until it gives up by itself.
    pub fn node_that_must_not_start(&self, arguments: &[String]) -> Done {
        self.program_that_must_not_start(lockstep(), arguments)
    }

    /// The same where node n is.
    pub fn node_that_must_not_start_at(&self, n: usize, arguments: &[String]) -> Done {
        let network = self.network.as_ref().expect("a network");
        self.program_that_must_not_start(network.command(n, &binary()), arguments)
    }

    fn program_that_must_not_start(&self, mut command: Command, arguments: &[String]) -> Done {
        command
            .args(arguments)
            .env_remove("LOCKSTEP_HOST")
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if begin.elapsed() > PATIENCE {
                let _ = child.kill();
                let _ = child.wait();
                panic!("a node with {arguments:?} started, or hung");
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let (mut out, mut err) = (String::new(), String::new());
        child.stdout.unwrap().read_to_string(&mut out).unwrap();
        child.stderr.unwrap().read_to_string(&mut err).unwrap();
        Done {
            code: status.code().unwrap_or(-1),
            out,
            err,
        }
    }

    fn child(&mut self, n: usize) -> &mut Child {
        let node = self.nodes.get_mut(&n).expect("the node was started");
        node.child.as_mut().expect("the node runs")
    }

    pub fn pid(&mut self, n: usize) -> u32 {
        self.child(n).id()
    }

    fn signal(&mut self, n: usize, signal: i32) {
        let pid = self.pid(n) as i32;
        // SAFETY: a signal to a child that was not waited for yet: the number is its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// SIGKILL.
    pub fn kill(&mut self, n: usize) {
        let child = self.child(n);
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        self.nodes.get_mut(&n).unwrap().child = None;
    }

    /// SIGTERM, until the process has ended by itself.
    pub fn stop(&mut self, n: usize) -> ExitStatus {
        self.signal(n, libc::SIGTERM);
        let status = eventually(&format!("n{n} ends"), || self.child(n).try_wait().unwrap());
        self.nodes.get_mut(&n).unwrap().child = None;
        status
    }

    /// SIGUSR2: the program is to be replaced.
    pub fn ask_to_upgrade(&mut self, n: usize) {
        self.signal(n, libc::SIGUSR2);
    }

    /// SIGTERM, without waiting.
    pub fn ask_to_stop(&mut self, n: usize) {
        self.signal(n, libc::SIGTERM);
    }

    /// How node n ended, if it has.
    pub fn ended(&mut self, n: usize) -> Option<ExitStatus> {
        let status = self.child(n).try_wait().unwrap()?;
        self.nodes.get_mut(&n).unwrap().child = None;
        Some(status)
    }

    /// SIGSTOP: alive to the kernel, silent to everybody else. A thread that runs goes on for a moment, so this waits for
    /// each of them.
    pub fn freeze(&mut self, n: usize) {
        self.signal(n, libc::SIGSTOP);
        let tasks = format!("/proc/{}/task", self.pid(n));
        eventually(&format!("n{n} stands still"), || {
            let all_stand = fs::read_dir(&tasks).unwrap().all(|task| {
                let stat = fs::read_to_string(task.unwrap().path().join("stat"));
                // A thread that has ended since stands still as well.
                stat.map_or(true, |stat| stat.contains(") T "))
            });
            all_stand.then_some(())
        });
    }

    pub fn thaw(&mut self, n: usize) {
        self.signal(n, libc::SIGCONT);
    }

    /// The process of node n has not ended.
    pub fn is_alive(&mut self, n: usize) -> bool {
        self.child(n).try_wait().unwrap().is_none()
    }

    pub fn log_path(&self, n: usize) -> PathBuf {
        self.dir.path().join(format!("n{n}.log"))
    }

    pub fn log(&self, n: usize) -> String {
        String::from_utf8_lossy(&fs::read(self.log_path(n)).unwrap_or_default()).into_owned()
    }

    fn command(&self, n: usize, line: &str) -> Command {
        let host = format!("unix:{}", self.run_dir(n).join("api.sock").display());
        let mut command = lockstep();
        command
            .env("LOCKSTEP_HOST", host)
            .args(line.split_whitespace())
            .stdin(Stdio::null());
        command
    }

    /// The command line, asking node n, without waiting for the end.
    pub fn begin(&self, n: usize, line: &str) -> Child {
        self.command(n, line).spawn().unwrap()
    }

    /// The command line, asking node n.
    pub fn run(&self, n: usize, line: &str) -> Done {
        let output = self.command(n, line).output().unwrap();
        Done {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    #[track_caller]
    pub fn ok(&self, n: usize, line: &str) -> String {
        let done = self.run(n, line);
        assert_eq!(done.code, 0, "{line}: {}", done.err);
        done.out
    }

    #[track_caller]
    pub fn json(&self, n: usize, line: &str) -> Value {
        let out = self.ok(n, &format!("{line} -o json"));
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("{line}: {e} in {out}"))
    }

    /// All there is to say about a volume, by node n.
    #[track_caller]
    pub fn volume(&self, n: usize, name: &str) -> Value {
        self.json(n, &format!("volume inspect {name}"))
    }

    /// Creates a volume, asking n1, and attaches it; gives the socket once it is served and healthy.
    #[track_caller]
    pub fn serve(&self, name: &str, create: &str, attach: &str) -> PathBuf {
        self.ok(1, &format!("volume create {name} {create}"));
        let printed = self.ok(1, &format!("volume attach {name} {attach}"));
        let socket = PathBuf::from(printed.trim());
        self.wait_for(1, name, "is healthy", |v| v["health"] == "healthy");
        assert!(socket.exists(), "{}", socket.display());
        socket
    }

    /// Waits until node n says this of a volume.
    #[track_caller]
    pub fn wait_for(
        &self,
        n: usize,
        name: &str,
        what: &str,
        mut reached: impl FnMut(&Value) -> bool,
    ) -> Value {
        let begin = Instant::now();
        loop {
            let done = self.run(n, &format!("volume inspect {name} -o json"));
            if let Ok(view) = serde_json::from_str::<Value>(&done.out) {
                if reached(&view) {
                    return view;
                }
                assert!(
                    begin.elapsed() < PATIENCE,
                    "gave up waiting until {name} {what}; it is {view:#}"
                );
            }
            assert!(
                begin.elapsed() < PATIENCE,
                "gave up waiting until {name} {what}: {done:?}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Detaches a volume, waiting for the front-end's end to be noticed.
    #[track_caller]
    pub fn detach(&self, n: usize, name: &str) {
        self.wait_for(n, name, "has no front-end", |v| {
            v["attachment"]["connected"] != true
        });
        self.ok(n, &format!("volume detach {name}"));
    }

    /// The data file of the volume's copy on node n.
    pub fn copy(&self, n: usize, volume: &Value) -> PathBuf {
        let id = volume["id"].as_str().expect("a volume has an id");
        self.data_dir(n).join("volumes").join(id).join("data")
    }

    /// Bytes that the volume's copy on node n takes on its disk.
    pub fn allocated(&self, n: usize, volume: &Value) -> u64 {
        let data = self.copy(n, volume);
        std::os::unix::fs::MetadataExt::blocks(&fs::metadata(data).unwrap()) * 512
    }

    /// S14: every copy that the record counts holds the same bytes as the master. Gives the nodes compared.
    #[track_caller]
    pub fn copies_are_identical(&self, n: usize, name: &str) -> Vec<String> {
        let volume = self.volume(n, name);
        let nodes: Vec<String> = copies(&volume, "in_sync");
        let number = |node: &String| node[1..].parse::<usize>().unwrap();
        let files: Vec<PathBuf> = nodes
            .iter()
            .map(|node| self.copy(number(node), &volume))
            .collect();
        for file in &files[1..] {
            if let Some(at) = first_difference(&files[0], file) {
                panic!(
                    "{} and {} differ at byte {at}; {volume:#}",
                    files[0].display(),
                    file.display()
                );
            }
        }
        nodes
    }

    /// Nothing is left of any volume: none is listed, and no node has a copy.
    #[track_caller]
    pub fn nothing_was_made(&self, n: usize) {
        assert_eq!(self.json(n, "volume ls -A"), Value::Array(Vec::new()));
        for n in self.nodes.keys() {
            let volumes = self.data_dir(*n).join("volumes");
            eventually(&format!("{} is empty", volumes.display()), || {
                let found = fs::read_dir(&volumes).map_or(0, Iterator::count);
                (found == 0).then_some(())
            });
        }
    }

    /// A figure of a volume among node n's metrics.
    #[track_caller]
    pub fn figure(&self, n: usize, metric: &str, name: &str) -> f64 {
        let url = format!("{}:5705", self.ip(n));
        let text = metrics_of(&url);
        let line = format!("{metric}{{namespace=\"default\",volume=\"{name}\"}} ");
        let found = text.lines().find_map(|l| l.strip_prefix(&line));
        let value = found.unwrap_or_else(|| panic!("no {line} in {text}"));
        value.parse().unwrap_or_else(|e| panic!("{value}: {e}"))
    }

    /// The rules named by the events of a volume, oldest first.
    #[track_caller]
    pub fn rules(&self, n: usize, name: &str) -> Vec<String> {
        let events = self.json(n, &format!("events --volume {name}"));
        let events = events.as_array().expect("events are a list");
        let rule = |e: &Value| e["rule"].as_str().unwrap_or_default().to_string();
        events.iter().map(rule).collect()
    }
}

impl Cluster {
    /// SIGKILL to whatever runs.
    pub fn kill_all(&mut self) {
        for node in self.nodes.values_mut() {
            if let Some(mut child) = node.child.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.kill_all();
        if std::thread::panicking() {
            for n in self.nodes.keys() {
                let log = self.log(*n);
                let lines: Vec<&str> = log.lines().collect();
                let end = &lines[lines.len().saturating_sub(LOG_LINES)..];
                eprintln!("--- n{n}: the end of its log\n{}", end.join("\n"));
            }
        }
    }
}

/// What a node tells Prometheus.
fn metrics_of(address: &str) -> String {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    let question = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(question.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// The name of node n's machine.
pub fn machine(n: usize) -> String {
    format!("n{n}.lockstep.test")
}

/// The binary under test: the one built with the test, or any other that `LOCKSTEP_BIN` names.
pub fn binary() -> PathBuf {
    let built = || env!("CARGO_BIN_EXE_lockstep").into();
    std::env::var_os("LOCKSTEP_BIN").map_or_else(built, PathBuf::from)
}

/// It, with nothing of our environment that would change what it does.
pub fn lockstep() -> Command {
    let mut command = Command::new(binary());
    command.env_remove("LOCKSTEP_HOST").env_remove("RUST_LOG");
    command
}

/// The nodes whose copies are in a state, the master's first, the others by name: which node a copy was placed on first
/// hangs on a few bytes of free space.
pub fn copies(volume: &Value, state: &str) -> Vec<String> {
    let list = volume["copies"].as_array().expect("a volume has copies");
    let mut found: Vec<(bool, String)> = list
        .iter()
        .filter(|c| c["state"] == state)
        .map(|c| {
            (
                c["role"] != "master",
                c["node"].as_str().unwrap().to_string(),
            )
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, node)| node).collect()
}

/// Where two files differ, if they do; a length that differs counts.
pub fn first_difference(a: &Path, b: &Path) -> Option<u64> {
    let open = |path: &Path| File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (a, b) = (open(a), open(b));
    let (len_a, len_b) = (a.metadata().unwrap().len(), b.metadata().unwrap().len());
    if len_a != len_b {
        return Some(len_a.min(len_b));
    }
    let (mut block_a, mut block_b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < len_a {
        let n = (len_a - at).min(1 << 20) as usize;
        a.read_exact_at(&mut block_a[..n], at).unwrap();
        b.read_exact_at(&mut block_b[..n], at).unwrap();
        if block_a[..n] != block_b[..n] {
            let inside = (0..n).find(|i| block_a[*i] != block_b[*i]).unwrap();
            return Some(at + inside as u64);
        }
        at += n as u64;
    }
    None
}
