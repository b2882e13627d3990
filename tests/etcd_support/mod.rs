//! Real etcd: one member or several, on loopback addresses of their own, to be killed, stopped and cut off.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lockstep::registry::{Access, CasError, Location, Registry, RegistryError};
use rustix::fs::{FlockOperation, flock};

/// Generous, since tests share processors: only something broken takes this long.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// Loopback blocks that can be in use at once on one machine.
const BLOCKS: u16 = 250;
/// Last lines of each member's log that a failing test shows.
const LOG_LINES: usize = 15;

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

/// How a member's processes are started: here, or inside some namespace.
pub type Launch = Box<dyn Fn(usize, &Path) -> Command + Send + Sync>;

/// The members of one etcd. Dropped, it kills them; dropped by a failing test, it shows their logs.
pub struct Etcd {
    dir: tempfile::TempDir,
    addresses: Vec<String>,
    children: Vec<Option<Child>>,
    extra: Vec<String>,
    scheme: &'static str,
    launch: Option<Launch>,
    /// A client's certificate, for etcdctl.
    tls: Option<PathBuf>,
    /// Whom etcdctl is.
    user: Option<&'static str>,
    _lock: Option<File>,
}

impl Etcd {
    /// Running members 1 …, with a leader.
    pub fn start(members: usize) -> Etcd {
        Self::start_with(members, "http", &[])
    }

    /// The same with more arguments, and `https` if these say so.
    pub fn start_with(members: usize, scheme: &'static str, extra: &[String]) -> Etcd {
        let mut etcd = Etcd::made(members, scheme, extra);
        etcd.start_all();
        etcd
    }

    fn made(members: usize, scheme: &'static str, extra: &[String]) -> Etcd {
        let (block, lock) = claim();
        let addresses = (1..=members)
            .map(|m| format!("127.120.{block}.{m}"))
            .collect();
        let mut etcd = Etcd::at(addresses, scheme, extra, None);
        etcd._lock = Some(lock);
        etcd
    }

    /// Running members that speak TLS and want a certificate of each client.
    pub fn start_tls(members: usize, pki: &Pki) -> Etcd {
        let hosts =
            (1..=BLOCKS).flat_map(|b| (1..=members).map(move |m| format!("127.120.{b}.{m}")));
        let server = pki.directory("server", "etcd", hosts.collect());
        let file = |name: &str| server.join(name).display().to_string();
        let mut etcd = Etcd::made(
            members,
            "https",
            &[
                format!("--cert-file={}", file("etcd.pem")),
                format!("--key-file={}", file("etcd-key.pem")),
                format!("--trusted-ca-file={}", file("etcd-ca.pem")),
                "--client-cert-auth".into(),
            ],
        );
        // Without a name, which etcd would take for a user.
        etcd.tls = Some(pki.directory("ctl", "etcd", Vec::new()));
        etcd.start_all();
        etcd
    }

    /// Asks for users and passwords from now on, and lets this one use the keys of a cluster.
    pub fn guard(&mut self, ours: &str) {
        let (name, password) = ours.split_once(':').expect("USER:PASSWORD");
        let line = |line: &str| drop(self.ok(1, &line.split(' ').collect::<Vec<_>>()));
        line("role add disks");
        line("role grant-permission disks --prefix=true readwrite /lockstep/default/");
        line("user add root --new-user-password root");
        line("role add root");
        line("user grant-role root root");
        self.ok(1, &["user", "add", name, "--new-user-password", password]);
        self.ok(1, &["user", "grant-role", name, "disks"]);
        self.ok(1, &["auth", "enable"]);
        self.user = Some("root:root");
    }

    /// Gives a user another password.
    pub fn change_password(&self, user: &str, password: &str) {
        let mut command = self.command(1, &["user", "passwd", user, "--interactive=false"]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        writeln!(child.stdin.take().unwrap(), "{password}").unwrap();
        assert!(child.wait().unwrap().success());
    }

    /// Members at these addresses, started by `launch`.
    pub fn start_at(addresses: Vec<String>, launch: Launch) -> Etcd {
        let mut etcd = Etcd::at(addresses, "http", &[], Some(launch));
        etcd.start_all();
        etcd
    }

    fn at(
        addresses: Vec<String>,
        scheme: &'static str,
        extra: &[String],
        launch: Option<Launch>,
    ) -> Etcd {
        installed();
        Etcd {
            dir: tempfile::Builder::new()
                .prefix("lockstep-etcd-")
                .tempdir()
                .unwrap(),
            children: addresses.iter().map(|_| None).collect(),
            addresses,
            extra: extra.to_vec(),
            scheme,
            launch,
            tls: None,
            user: None,
            _lock: None,
        }
    }

    fn start_all(&mut self) {
        for m in 1..=self.addresses.len() {
            self.start_member(m);
        }
        for m in 1..=self.addresses.len() {
            self.await_member(m);
        }
    }

    /// Starts member m (again) with the data it has.
    pub fn start_member(&mut self, m: usize) {
        self.spawn_member(m, "new");
    }

    /// Member m's machine is gone with its disk: a new machine takes its place and address, as etcd's manual says.
    pub fn replace_member(&mut self, m: usize) {
        assert!(!self.is_running(m), "m{m} still runs");
        let asked = (1..=self.addresses.len())
            .find(|other| self.is_running(*other))
            .expect("a member runs");
        let list = self.ok(asked, &["member", "list", "-w", "json"]);
        let list: serde_json::Value = serde_json::from_str(&list).unwrap();
        let members = list["members"].as_array().unwrap();
        let gone = members.iter().find(|v| v["name"] == format!("m{m}"));
        let id = gone.and_then(|v| v["ID"].as_u64()).expect("m is a member");
        self.ok(asked, &["member", "remove", &format!("{id:x}")]);
        let peer = format!("--peer-urls=http://{}:2380", self.addresses[m - 1]);
        self.ok(asked, &["member", "add", &format!("m{m}"), &peer]);
        fs::remove_dir_all(self.dir.path().join(format!("m{m}"))).unwrap();
        self.spawn_member(m, "existing");
        self.await_member(m);
    }

    /// Member 1, the only one, is gone with its disk: it begins anew with what was saved.
    pub fn restore(&mut self, saved: &Path) {
        assert!(self.addresses.len() == 1 && !self.is_running(1));
        let data = self.dir.path().join("m1");
        fs::remove_dir_all(&data).unwrap();
        let peer = format!("http://{}:2380", self.addresses[0]);
        let line = format!(
            "snapshot restore {} --data-dir {} --name m1 --initial-cluster m1={peer} --initial-advertise-peer-urls {peer}",
            saved.display(),
            data.display()
        );
        self.ok(1, &line.split(' ').collect::<Vec<_>>());
        self.spawn_member(1, "new");
        self.await_member(1);
    }

    fn spawn_member(&mut self, m: usize, state: &str) {
        let (scheme, ip) = (self.scheme, &self.addresses[m - 1]);
        let all: Vec<String> = self
            .addresses
            .iter()
            .enumerate()
            .map(|(i, ip)| format!("m{}=http://{ip}:2380", i + 1))
            .collect();
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path(m))
            .unwrap();
        let mut command = match &self.launch {
            Some(launch) => launch(m, Path::new("etcd")),
            None => Command::new("etcd"),
        };
        command
            .args(["--name", &format!("m{m}")])
            .arg("--data-dir")
            .arg(self.dir.path().join(format!("m{m}")))
            .args(["--listen-client-urls", &format!("{scheme}://{ip}:2379")])
            .args(["--advertise-client-urls", &format!("{scheme}://{ip}:2379")])
            .args(["--listen-peer-urls", &format!("http://{ip}:2380")])
            .args([
                "--initial-advertise-peer-urls",
                &format!("http://{ip}:2380"),
            ])
            .args(["--initial-cluster", &all.join(",")])
            .args(["--initial-cluster-state", state])
            .args(["--logger", "zap"])
            .args(&self.extra)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let child = command.spawn().unwrap();
        let old = self.children[m - 1].replace(child);
        assert!(old.is_none(), "m{m} ran already");
    }

    /// Waits until member m serves: it takes connections and knows a leader.
    pub fn await_member(&mut self, m: usize) {
        eventually(&format!("m{m} serves"), || {
            let child = self.children[m - 1].as_mut().unwrap();
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none(), "m{m} ended: {ended:?}");
            self.status(m)?["leader"]
                .as_u64()
                .filter(|l| *l != 0)
                .map(drop)
        });
    }

    /// What member m says of itself.
    fn status(&self, m: usize) -> Option<serde_json::Value> {
        let done = self.ctl(m, &["endpoint", "status", "-w", "json"]);
        let status: serde_json::Value = serde_json::from_slice(&done.stdout).ok()?;
        Some(status[0]["Status"].clone())
    }

    /// Where member m takes clients.
    pub fn url(&self, m: usize) -> String {
        format!("{}://{}:2379", self.scheme, self.addresses[m - 1])
    }

    /// `--registry` for these members, in this order.
    pub fn location(&self, members: &[usize]) -> String {
        let urls: Vec<String> = members.iter().map(|m| self.url(*m)).collect();
        format!("etcd:{}", urls.join(","))
    }

    /// A client of all members.
    pub fn open(&self) -> Arc<dyn Registry> {
        let all: Vec<usize> = (1..=self.addresses.len()).collect();
        self.open_at(&all)
    }

    /// A client that knows these members.
    pub fn open_at(&self, members: &[usize]) -> Arc<dyn Registry> {
        self.open_with(members, &Access::default()).unwrap()
    }

    pub fn open_with(
        &self,
        members: &[usize],
        access: &Access,
    ) -> Result<Arc<dyn Registry>, RegistryError> {
        let location: Location = self.location(members).parse().unwrap();
        location.open(access)
    }

    fn signal(&mut self, m: usize, signal: i32) {
        let child = self.children[m - 1].as_ref().expect("the member runs");
        // SAFETY: a signal to a child that was not waited for yet: the number is its own.
        assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
    }

    /// SIGKILL.
    pub fn kill(&mut self, m: usize) {
        let mut child = self.children[m - 1].take().expect("the member runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGSTOP: it takes connections, thanks to its kernel, and says nothing. Returns when every thread stands still.
    pub fn freeze(&mut self, m: usize) {
        self.signal(m, libc::SIGSTOP);
        let id = self.children[m - 1].as_ref().unwrap().id();
        let tasks = format!("/proc/{id}/task");
        eventually(&format!("m{m} stands still"), || {
            let all = fs::read_dir(&tasks).unwrap().all(|task| {
                let stat = fs::read_to_string(task.unwrap().path().join("stat"));
                stat.map_or(true, |stat| stat.contains(") T "))
            });
            all.then_some(())
        });
    }

    pub fn thaw(&mut self, m: usize) {
        self.signal(m, libc::SIGCONT);
    }

    pub fn is_running(&self, m: usize) -> bool {
        self.children[m - 1].is_some()
    }

    pub fn kill_all(&mut self) {
        for child in &mut self.children {
            if let Some(mut child) = child.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }

    /// All members again, and a leader.
    pub fn restart_all(&mut self) {
        for m in 1..=self.addresses.len() {
            if !self.is_running(m) {
                self.start_member(m);
            }
        }
        for m in 1..=self.addresses.len() {
            self.await_member(m);
        }
    }

    /// Which member leads, once one does.
    pub fn leader(&self) -> usize {
        eventually("a member leads", || {
            (1..=self.addresses.len()).find(|m| {
                let status = self.is_running(*m).then(|| self.status(*m)).flatten();
                status.is_some_and(|s| {
                    let me = &s["header"]["member_id"];
                    me.is_number() && s["leader"] == *me
                })
            })
        })
    }

    /// etcd's own command line, asking member m.
    pub fn ctl(&self, m: usize, arguments: &[&str]) -> Output {
        self.command(m, arguments).output().unwrap()
    }

    fn command(&self, m: usize, arguments: &[&str]) -> Command {
        let program = Path::new("etcdctl");
        let mut command = match &self.launch {
            Some(launch) => launch(m, program),
            None => Command::new(program),
        };
        command.args(["--endpoints", &self.url(m), "--command-timeout", "5s"]);
        if let Some(dir) = &self.tls {
            for (flag, file) in [
                ("--cacert", "etcd-ca.pem"),
                ("--cert", "etcd.pem"),
                ("--key", "etcd-key.pem"),
            ] {
                command.arg(flag).arg(dir.join(file));
            }
        }
        if let Some(user) = self.user {
            command.args(["--user", user]);
        }
        command.args(arguments).env("ETCDCTL_API", "3");
        command
    }

    #[track_caller]
    pub fn ok(&self, m: usize, arguments: &[&str]) -> String {
        let done = self.ctl(m, arguments);
        assert!(
            done.status.success(),
            "etcdctl {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&done.stderr)
        );
        String::from_utf8_lossy(&done.stdout).into_owned()
    }

    fn log_path(&self, m: usize) -> PathBuf {
        self.dir.path().join(format!("m{m}.log"))
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill_all();
        if std::thread::panicking() {
            for m in 1..=self.addresses.len() {
                let log = fs::read(self.log_path(m)).unwrap_or_default();
                let log = String::from_utf8_lossy(&log).into_owned();
                let lines: Vec<&str> = log.lines().collect();
                let end = &lines[lines.len().saturating_sub(LOG_LINES)..];
                eprintln!("--- m{m}: the end of its log\n{}", end.join("\n"));
            }
        }
    }
}

/// Certificates for a TLS etcd on loopback addresses, and directories for its clients.
pub struct Pki {
    dir: tempfile::TempDir,
    pub ca: rcgen::CertifiedIssuer<'static, rcgen::KeyPair>,
}

impl Pki {
    pub fn new() -> Pki {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        Pki {
            dir: tempfile::tempdir().unwrap(),
            ca: rcgen::CertifiedIssuer::self_signed(params, key).unwrap(),
        }
    }

    /// A directory with our authority, and a certificate for `names` under this file name.
    pub fn directory(&self, name: &str, files: &str, names: Vec<String>) -> PathBuf {
        let dir = self.dir.path().join(name);
        fs::create_dir_all(&dir).unwrap();
        let params = rcgen::CertificateParams::new(names).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.ca).unwrap();
        fs::write(dir.join("etcd-ca.pem"), self.ca.pem()).unwrap();
        fs::write(dir.join(format!("{files}.pem")), certificate.pem()).unwrap();
        fs::write(dir.join(format!("{files}-key.pem")), key.serialize_pem()).unwrap();
        dir
    }
}

/// A file with `USER:PASSWORD`, as nodes take it.
pub fn credentials(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join("etcd-user");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path
}

/// Whoever holds the lock on the block's file has the addresses 127.120.BLOCK.x.
fn claim() -> (u16, File) {
    for block in 1..=BLOCKS {
        let path = format!("/tmp/lockstep-etcd-{block}.lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .unwrap_or_else(|e| panic!("{path}: {e}"));
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return (block, lock);
        }
    }
    panic!("all {BLOCKS} loopback blocks are in use");
}

/// Without etcd nothing is tested here, and that must not look like a pass.
fn installed() {
    for (program, package) in [("etcd", "etcd-server"), ("etcdctl", "etcd-client")] {
        let found = Command::new(program)
            .arg("--help")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        assert!(
            found.is_ok(),
            "this test needs a real {program}: install the package {package} (scripts/test does)"
        );
    }
}

/// Adds `token` to the list under `key` until it is known to be there, as everybody must who swaps: what is unknown is
/// read back. Gives how often the outcome was unknown.
pub fn append(registry: &dyn Registry, key: &str, token: &str) -> usize {
    let begin = Instant::now();
    let mut unknown = 0;
    loop {
        assert!(begin.elapsed() < PATIENCE, "{token} could not be added");
        let Ok(now) = registry.get(key) else {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        let list = now.as_ref().map_or(String::new(), |e| {
            String::from_utf8(e.value.clone()).unwrap()
        });
        if list.split(' ').any(|t| t == token) {
            // An attempt whose outcome was unknown, known now.
            assert!(unknown > 0, "{token} is there and nobody had added it");
            return unknown;
        }
        let next = format!("{list} {token}");
        match registry.cas(key, now.map(|e| e.revision), Some(next.as_bytes())) {
            Ok(_) => return unknown,
            Err(CasError::Ambiguous { .. }) => unknown += 1,
            Err(CasError::Conflict { .. } | CasError::Registry(_)) => {}
        }
    }
}
