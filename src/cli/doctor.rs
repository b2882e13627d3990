//! `lockstep doctor`: whether this machine can run a node as it would be told to, and what to do where it cannot.
//!
//! Nothing is made or changed: what a check needs to write it writes into a file that has no name, and a registry that
//! is not there yet is not asked.

use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use hyper::Method;
use io_uring::{IoUring, opcode};
use rustix::fs::{Access, OFlags, statfs};
use rustix::process::{Resource, getrlimit};
use serde::{Deserialize, Serialize};

use super::node_flags::Flags;
use super::output::{Format, Table, print};
use super::{Failure, Global};
use crate::api::client::{Target, ask, runtime};
use crate::cluster::config::NodeConfig;
use crate::cluster::fault::{Code, Fault};
use crate::cluster::join::open_registry;
use crate::cluster::live::{Identity, LocalStatus, STATUS_PATH};
use crate::cluster::model::NodeRecord;
use crate::cluster::placement::FREE_MIN;
use crate::cluster::store::Store;
use crate::cluster::units::{show_size, wall_ms};
use crate::registry::Location;
use crate::replication::ids::NodeName;
use crate::wire::tls::has_keys;

const EXAMPLE: &str = "Examples:\n  lockstep doctor\n  \
    lockstep doctor --config /etc/lockstep/node.toml\n  \
    lockstep doctor --listen 127.0.0.2:5703 --http 127.0.0.2:5705 --data-dir /srv/lockstep -o json";

/// The oldest kernel (5.15): io_uring as the engine uses it.
const KERNEL_MIN: (u32, u32) = (5, 15);
/// Locked memory that rings need where the kernel counts it per user.
const MEMLOCK_MIN: u64 = 8 << 20;
/// Open files: a volume takes some descriptors a copy, a machine and a peer.
const NOFILE_MIN: u64 = 4096;
/// A disk that takes longer to make one block durable makes each flush and each new region that slow.
const SYNC_SLOW: Duration = Duration::from_millis(20);
/// How often that is tried; the median counts.
const SYNCS: usize = 5;
/// A registry that takes longer makes each change of the in-sync set, and so a failover, that slow.
const REGISTRY_SLOW: Duration = Duration::from_millis(200);
/// Clocks may differ by this before events are confusing; nothing else depends on them.
const CLOCK_APART: u64 = 1000;
/// Clock sources that are read without a system call or a trap.
const FAST_CLOCKS: [&str; 5] = [
    "tsc",
    "kvm-clock",
    "hyperv_clocksource_tsc_page",
    "arch_sys_counter",
    "xen",
];
/// Where the data of a direct read or write must begin, in memory and on the disk.
const BLOCK: usize = 4096;
/// The name of a node that is not given one.
const NOBODY: &str = "doctor";
/// How long whoever answers on a port has to do so.
const PATIENCE: Duration = Duration::from_secs(1);

#[derive(Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Command {
    #[command(flatten)]
    flags: Flags,
    /// A TOML file with any of these flags as keys; flags win
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Ok,
    Warn,
    Fail,
}

/// One check.
#[derive(Debug, Serialize)]
struct Check {
    check: &'static str,
    outcome: Outcome,
    detail: String,
    /// What to do about it; empty when all is well.
    remedy: String,
}

impl Check {
    fn ok(check: &'static str, detail: impl Into<String>) -> Self {
        Self {
            check,
            outcome: Outcome::Ok,
            detail: detail.into(),
            remedy: String::new(),
        }
    }

    fn warn(check: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            outcome: Outcome::Warn,
            remedy: remedy.into(),
            ..Self::ok(check, detail)
        }
    }

    fn fail(check: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            outcome: Outcome::Fail,
            ..Self::warn(check, detail, remedy)
        }
    }
}

pub(super) fn run(command: Command, global: &Global) -> Result<(), Failure> {
    let flags = match &command.config {
        Some(path) => command.flags.or(Flags::of_file(path)?),
        None => command.flags,
    };
    // Only what a certificate is for depends on the name.
    let config = flags.named(NOBODY).config()?;
    let checks = checks(&config);
    print(global.output, &checks, |checks| table(checks))?;
    let failed: Vec<&str> = checks
        .iter()
        .filter(|c| c.outcome == Outcome::Fail)
        .map(|c| c.check)
        .collect();
    if failed.is_empty() {
        return Ok(());
    }
    let fault = Fault::state(format!("a node cannot run here: {}", failed.join(", ")));
    Err(match global.output {
        Format::Table => fault.hint("the remedies are in the list"),
        Format::Json | Format::Yaml => fault,
    }
    .into())
}

fn checks(config: &NodeConfig) -> Vec<Check> {
    let mut checks = vec![
        kernel(&fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default()),
        uring(),
        limit(
            "memlock",
            Resource::Memlock,
            MEMLOCK_MIN,
            "LimitMEMLOCK=infinity (ulimit -l unlimited)",
        ),
        limit(
            "open files",
            Resource::Nofile,
            NOFILE_MIN,
            "LimitNOFILE=1048576 (ulimit -n 1048576)",
        ),
    ];
    checks.extend(disk(&config.data_dir));
    checks.push(run_dir(&config.run_dir));
    checks.push(port(
        "replication port",
        "--listen",
        config.listen,
        config.http,
    ));
    checks.push(port("HTTP port", "--http", config.http, config.http));
    checks.extend(node(config.http));
    checks.extend(certificate(config));
    let (registry, nodes) = registry(config);
    checks.push(registry);
    checks.push(clock_source(
        &fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource")
            .unwrap_or_default(),
    ));
    checks.push(clock(&nodes));
    checks
}

/// Whether the node can prove who it is, if it is to.
fn certificate(config: &NodeConfig) -> Option<Check> {
    let dir = config
        .access
        .tls_dir
        .as_deref()
        .filter(|dir| has_keys(dir))?;
    let name = "certificate";
    if config.name.0 == NOBODY {
        let what = format!("{}: whose it should be is not known", dir.display());
        return Some(Check::warn(name, what, "give --name, as the node has it"));
    }
    Some(match config.security() {
        Ok(_) => Check::ok(name, format!("{}: of node {}", dir.display(), config.name)),
        Err(fault) => Check::fail(
            name,
            fault.message,
            "make one as docs/OPERATIONS.md says, \"TLS between nodes\"",
        ),
    })
}

fn kernel(release: &str) -> Check {
    let release = release.trim();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next().and_then(|n| n.parse::<u32>().ok());
    let (Some(major), Some(minor)) = (number(), number()) else {
        return Check::warn(
            "kernel",
            format!("'{release}' is no version that is understood"),
            "use Linux 5.15 or later",
        );
    };
    if (major, minor) < KERNEL_MIN {
        return Check::fail("kernel", release, "use Linux 5.15 or later");
    }
    if cfg!(target_endian = "big") {
        return Check::fail(
            "kernel",
            "a big-endian machine",
            "use a little-endian machine",
        );
    }
    Check::ok("kernel", release)
}

fn uring() -> Check {
    let ring = match IoUring::new(8) {
        Ok(ring) => ring,
        Err(e) => {
            let remedy = match e.kind() {
                ErrorKind::PermissionDenied => {
                    "sysctl kernel.io_uring_disabled=0; in a container, allow io_uring in its seccomp profile"
                }
                ErrorKind::OutOfMemory => "raise the memlock limit: LimitMEMLOCK=infinity",
                _ => "use a kernel with CONFIG_IO_URING",
            };
            return Check::fail("io_uring", format!("no ring: {e}"), remedy);
        }
    };
    let mut probe = io_uring::Probe::new();
    if let Err(e) = ring.submitter().register_probe(&mut probe) {
        return Check::fail(
            "io_uring",
            format!("it does not tell what it can: {e}"),
            "use Linux 5.15 or later",
        );
    }
    let lacking: Vec<&str> = [
        ("read", opcode::Readv::CODE),
        ("write", opcode::Writev::CODE),
        ("fsync", opcode::Fsync::CODE),
        ("fallocate", opcode::Fallocate::CODE),
    ]
    .into_iter()
    .filter(|(_, code)| !probe.is_supported(*code))
    .map(|(name, _)| name)
    .collect();
    match lacking.is_empty() {
        true => Check::ok("io_uring", "a ring was made"),
        false => Check::fail(
            "io_uring",
            format!("it cannot {}", lacking.join(", ")),
            "use Linux 5.15 or later",
        ),
    }
}

fn limit(check: &'static str, resource: Resource, wanted: u64, remedy: &str) -> Check {
    match getrlimit(resource).current {
        None => Check::ok(check, "unlimited"),
        Some(n) if n >= wanted => Check::ok(check, n.to_string()),
        Some(n) => Check::warn(check, format!("{n}, and {wanted} are better"), remedy),
    }
}

/// The directory itself, or the nearest one above that exists.
fn existing(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.into());
    let found = absolute.ancestors().find(|p| p.is_dir());
    found.unwrap_or(Path::new("/")).into()
}

fn may_write(dir: &Path) -> bool {
    rustix::fs::access(dir, Access::WRITE_OK | Access::EXEC_OK).is_ok()
}

fn not_writable(check: &'static str, flag: &str, dir: &Path) -> Check {
    Check::fail(
        check,
        format!("{} cannot be written", dir.display()),
        format!("run as another user, or give {flag} a directory that this user may write"),
    )
}

fn disk(data_dir: &Path) -> Vec<Check> {
    let dir = existing(data_dir);
    if !may_write(&dir) {
        return vec![not_writable("disk", "--data-dir", &dir)];
    }
    let mut checks = Vec::new();
    match statfs(&dir) {
        Ok(fs) => {
            let free = fs.f_bavail * u64::try_from(fs.f_bsize).unwrap_or(0);
            let detail = format!("{} free in {}", show_size(free), dir.display());
            checks.push(match free < FREE_MIN {
                true => Check::fail(
                    "disk",
                    detail,
                    format!(
                        "free some space: a copy is placed where {} are free",
                        show_size(FREE_MIN)
                    ),
                ),
                false => Check::ok("disk", detail),
            });
        }
        Err(e) => checks.push(Check::fail(
            "disk",
            format!("{}: {e}", dir.display()),
            "mend the file system",
        )),
    }
    checks.push(direct(&dir));
    checks
}

/// A buffer whose address suits O_DIRECT.
#[repr(align(4096))]
struct Block([u8; BLOCK]);

/// Whether writes go past the page cache, and how long a block takes to be durable.
fn direct(dir: &Path) -> Check {
    const NAME: &str = "durable writes";
    let open = |flags: OFlags| {
        fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags.bits().cast_signed())
            .open(dir)
    };
    let file = match open(OFlags::TMPFILE | OFlags::DIRECT) {
        Ok(file) => file,
        Err(_) => match open(OFlags::TMPFILE) {
            Ok(_) => {
                return Check::warn(
                    NAME,
                    format!(
                        "{} has no direct I/O (a file system in memory?)",
                        dir.display()
                    ),
                    "for data that must survive a power cut, give --data-dir a directory on a disk",
                );
            }
            Err(e) => {
                return Check::warn(
                    NAME,
                    format!("not tried: no nameless file in {}: {e}", dir.display()),
                    "ext4 and XFS have them",
                );
            }
        },
    };
    let block = Block([0; BLOCK]);
    let mut took = Vec::new();
    for i in 0..SYNCS {
        let begun = Instant::now();
        let done = file
            .write_all_at(&block.0, (i * BLOCK) as u64)
            .and_then(|()| file.sync_data());
        if let Err(e) = done {
            return Check::fail(
                NAME,
                format!("{}: {e}", dir.display()),
                "give --data-dir a directory on a sound disk with room",
            );
        }
        took.push(begun.elapsed());
    }
    took.sort();
    let median = took[SYNCS / 2];
    let detail = format!(
        "{:.1} ms for a block, the median of {SYNCS}",
        median.as_secs_f64() * 1e3
    );
    match median > SYNC_SLOW {
        true => Check::warn(
            NAME,
            detail,
            "each flush of a guest waits for this on every copy: use a faster disk, or one with power-loss protection",
        ),
        false => Check::ok(NAME, detail),
    }
}

fn run_dir(dir: &Path) -> Check {
    let found = existing(dir);
    match may_write(&found) {
        true => Check::ok(
            "run directory",
            format!("{} can be written", found.display()),
        ),
        false => not_writable("run directory", "--run-dir", &found),
    }
}

fn port(check: &'static str, flag: &str, address: SocketAddr, http: SocketAddr) -> Check {
    match TcpListener::bind(address) {
        Ok(_) => Check::ok(check, format!("{address} is free")),
        Err(e) if e.kind() == ErrorKind::AddrInUse => match who(http) {
            Some(who) => Check::ok(check, format!("{address} is in use by node {}", who.node)),
            None => Check::fail(
                check,
                format!("{address} is in use by something else"),
                format!("end that (ss -ltnp shows it), or give {flag} another address"),
            ),
        },
        Err(e) => Check::fail(
            check,
            format!("{address}: {e}"),
            format!("give {flag} an address of this machine"),
        ),
    }
}

fn who(http: SocketAddr) -> Option<Identity> {
    serde_json::from_slice(&get(&http.to_string(), "/healthz")?).ok()
}

/// What a node says of itself.
#[derive(Deserialize)]
struct Health {
    node: NodeName,
    status: String,
    #[serde(default)]
    why: String,
}

/// How the node is that runs here, if one does.
fn node(http: SocketAddr) -> Option<Check> {
    const NAME: &str = "node";
    let health: Health = serde_json::from_slice(&get(&http.to_string(), "/healthz")?).ok()?;
    let Health { node, status, why } = health;
    Some(match status.as_str() {
        "ok" => Check::ok(NAME, format!("node {node} runs here")),
        "waiting" => Check::warn(
            NAME,
            format!("node {node} runs here, and waits: {why}"),
            "nothing has to be restarted: it serves its copies, and volumes when the registry answers",
        ),
        status => Check::fail(
            NAME,
            format!("node {node} is {status}: {why}"),
            "start it again when that is put right",
        ),
    })
}

fn get(address: &str, path: &str) -> Option<Vec<u8>> {
    let runtime = runtime().ok()?;
    let target = Target::Tcp(address.into());
    let asked = ask(&target, Method::GET, path, None, Some(PATIENCE));
    Some(runtime.block_on(asked).ok()?.body.to_vec())
}

/// How the registry is, and the nodes that it knows.
fn registry(config: &NodeConfig) -> (Check, Vec<NodeRecord>) {
    const NAME: &str = "registry";
    let name = config.registry.to_string();
    if let Location::Sqlite(path) = &config.registry
        && !path.exists()
    {
        let dir = existing(path.parent().unwrap_or(Path::new("/")));
        let check = match may_write(&dir) {
            true => Check::ok(
                NAME,
                format!("{name} is not there yet; the first node makes it"),
            ),
            false => not_writable(NAME, "--registry", &dir),
        };
        return (check, Vec::new());
    }
    let begun = Instant::now();
    // Opening makes the data directory; here that must be one that is there.
    let elsewhere = NodeConfig {
        data_dir: existing(&config.data_dir),
        ..config.clone()
    };
    let read = open_registry(&elsewhere).and_then(|r| Ok(Store::new(r).snapshot()?));
    let snapshot = match read {
        Ok(snapshot) => snapshot,
        Err(fault) => {
            let remedy = match (fault.code, fault.hint) {
                // What waits meanwhile is of no interest to one who has not begun.
                (Code::TryAgain, _) => "start it, open the way to its port, or name in --registry a member that this machine reaches".into(),
                (_, Some(hint)) => hint,
                (_, None) => "see --registry in lockstep node --help".into(),
            };
            return (Check::fail(NAME, fault.message, remedy), Vec::new());
        }
    };
    let took = begun.elapsed();
    let detail = format!(
        "{name}: {} nodes, {} volumes, read in {:.1} ms",
        snapshot.nodes.len(),
        snapshot.volumes.len(),
        took.as_secs_f64() * 1e3
    );
    let nodes = snapshot.nodes.into_values().map(|(n, _)| n).collect();
    let check = match took > REGISTRY_SLOW {
        true => Check::warn(
            NAME,
            detail,
            "a failover waits for it twice: bring it nearer, or relieve it",
        ),
        false => Check::ok(NAME, detail),
    };
    (check, nodes)
}

fn clock_source(name: &str) -> Check {
    match name.trim() {
        "" => Check::warn("clock source", "not known", "none: /sys is not mounted"),
        name if FAST_CLOCKS.contains(&name) => Check::ok("clock source", name),
        name => Check::warn(
            "clock source",
            format!("{name} is slow to read"),
            "each request reads the clock: use tsc (or the hypervisor's own) if the machine has it",
        ),
    }
}

/// By how much the clocks of the cluster's nodes differ from ours.
fn clock(nodes: &[NodeRecord]) -> Check {
    let apart: Vec<(u64, &NodeRecord)> = nodes
        .iter()
        .filter_map(|node| {
            let before = wall_ms();
            let status: LocalStatus =
                serde_json::from_slice(&get(&node.http, STATUS_PATH)?).ok()?;
            let after = wall_ms();
            // What the answer's own way may explain is no difference.
            let late = status.now.saturating_sub(after);
            (status.now > 0).then_some((late.max(before.saturating_sub(status.now)), node))
        })
        .collect();
    match apart.iter().max_by_key(|(ms, _)| *ms) {
        None => Check::ok("clock", "no other node answers to compare it with"),
        Some((ms, node)) if *ms > CLOCK_APART => Check::warn(
            "clock",
            format!("{:.1} s apart from node {}", *ms as f64 / 1e3, node.name),
            "have all machines follow NTP: the times of events come from their clocks (nothing else depends on them)",
        ),
        Some((ms, _)) => Check::ok(
            "clock",
            format!("at most {ms} ms apart from {} nodes", apart.len()),
        ),
    }
}

fn table(checks: &[Check]) -> String {
    let mut table = Table::new(&["CHECK", "RESULT", "DETAIL"]);
    for c in checks {
        let outcome = match c.outcome {
            Outcome::Ok => "ok",
            Outcome::Warn => "warning",
            Outcome::Fail => "FAILED",
        };
        table.row(vec![c.check.into(), outcome.into(), c.detail.clone()]);
        if !c.remedy.is_empty() {
            table.row(vec![
                String::new(),
                String::new(),
                format!("-> {}", c.remedy),
            ]);
        }
    }
    table.text()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_judged_by_their_version() {
        for (release, expected) in [
            ("6.12.48+deb13-amd64\n", Outcome::Ok),
            ("5.15.0-100-generic", Outcome::Ok),
            ("5.14.21", Outcome::Fail),
            ("4.19.0", Outcome::Fail),
            ("custom", Outcome::Warn),
            ("", Outcome::Warn),
        ] {
            let check = kernel(release);
            assert_eq!(check.outcome, expected, "{release}");
            assert_eq!(check.remedy.is_empty(), expected == Outcome::Ok);
        }
    }

    #[test]
    fn a_check_makes_nothing_and_a_port_in_use_is_named_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b/c");
        assert_eq!(existing(&deep), dir.path());
        assert_eq!(run_dir(&deep).outcome, Outcome::Ok);
        assert!(!deep.exists(), "a check makes nothing");

        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let nobody: SocketAddr = "127.0.0.1:9".parse().unwrap();
        let check = port("replication port", "--listen", address, nobody);
        assert_eq!(check.outcome, Outcome::Fail);
        assert!(check.remedy.contains("--listen"), "{check:?}");
        drop(taken);
        assert_eq!(
            port("replication port", "--listen", address, nobody).outcome,
            Outcome::Ok
        );
        let foreign: SocketAddr = "192.0.2.1:5703".parse().unwrap();
        assert_eq!(
            port("replication port", "--listen", foreign, nobody).outcome,
            Outcome::Fail
        );
        assert_eq!(clock_source("hpet").outcome, Outcome::Warn);
        assert_eq!(clock_source("tsc\n").outcome, Outcome::Ok);
    }
}
