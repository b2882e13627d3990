//! A network of its own for a cluster: every node in a network namespace, all on one bridge in one more namespace, and
//! packet filters that cut the way from one node to another.
//!
//! A node with the SQLite registry listens on a loopback address only, as that registry is one machine's. So the wires
//! here carry 127.A.B.n: the namespace's own `lo` gives its 127.0.0.0/8 up, and `route_localnet` lets the kernel treat the
//! addresses as any others. To the nodes they are loopback addresses; to us they are wires that can be cut. On the real
//! `lo` they could not be told apart: whatever connects there comes from 127.0.0.1.
//!
//! Nodes whose registry is etcd have no such bound, and get addresses as machines have them: 10.A.B.n.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

/// What the names of all namespaces here begin with; the process's number follows.
const PREFIX: &str = "lockstep-chaos-";

/// Where `ip netns exec` looks for what is special in a namespace's /etc.
const ETC: &str = "/etc/netns";

/// How a way is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum How {
    /// Packets vanish.
    Drop,
    /// The sender is told that the connection is gone.
    Reset,
    /// Every third packet vanishes.
    Lossy,
    /// Whoever wants to connect is not heard. What is connected already, and who connects the other way, goes on: a
    /// firewall's idea of one direction.
    Connect,
    /// Packets to this TCP port vanish, and no others.
    Port(u16),
}

/// The way from one node to another, cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    pub from: usize,
    pub to: usize,
    pub how: How,
}

/// The namespaces. Dropped, it removes them.
pub struct Network {
    /// Of this network's namespaces.
    prefix: String,
    /// The first three numbers of its addresses.
    net: String,
    nodes: usize,
}

impl Network {
    /// Namespaces for nodes 1 … `nodes` with the addresses `net`.1 …
    pub fn new(net: &str, nodes: usize) -> Network {
        may_make_networks();
        sweep();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, SeqCst);
        let network = Network {
            prefix: format!("{PREFIX}{}-{count}-", std::process::id()),
            net: net.into(),
            nodes,
        };
        let switch = network.name("switch");
        ip(&["netns", "add", &switch]);
        ip(&["-n", &switch, "link", "add", "br0", "type", "bridge"]);
        ip(&["-n", &switch, "link", "set", "br0", "up"]);
        for n in 1..=nodes {
            network.add(n, &switch);
        }
        network
    }

    fn add(&self, n: usize, switch: &str) {
        let (node, port) = (self.namespace(n), format!("n{n}"));
        ip(&["netns", "add", &node]);
        ip(&["-n", &node, "link", "set", "lo", "up"]);
        let loopback = self.net.starts_with("127.");
        if loopback {
            ip(&["-n", &node, "addr", "flush", "dev", "lo"]);
        }
        let veth = ["link", "add", "eth0", "type", "veth"];
        let peer = ["peer", "name", &port, "netns", switch];
        ip(&[&["-n", &node][..], &veth, &peer].concat());
        if loopback {
            let allow = "echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet";
            ip(&["netns", "exec", &node, "sh", "-c", allow]);
        }
        let address = format!("{}/24", self.address(n));
        ip(&["-n", &node, "addr", "add", &address, "dev", "eth0"]);
        ip(&["-n", &node, "link", "set", "eth0", "up"]);
        ip(&["-n", switch, "link", "set", &port, "master", "br0", "up"]);
    }

    fn name(&self, what: &str) -> String {
        format!("{}{what}", self.prefix)
    }

    /// The name of node n's namespace.
    pub fn namespace(&self, n: usize) -> String {
        assert!((1..=self.nodes).contains(&n), "n{n} has no namespace");
        self.name(&format!("n{n}"))
    }

    pub fn address(&self, n: usize) -> String {
        format!("{}.{n}", self.net)
    }

    /// `program`, to be run where node n is. The process that is spawned becomes the program.
    pub fn command(&self, n: usize, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(n)]);
        command.arg(program);
        command
    }

    pub fn cut(&self, cut: Cut) {
        self.filter("-I", cut);
    }

    /// Ends a cut.
    pub fn heal(&self, cut: Cut) {
        self.filter("-D", cut);
    }

    /// What every node's machine finds in its /etc/hosts, and its name server (nobody has that address: whoever asks, waits).
    /// From before a node's process starts; a change reaches those that run.
    pub fn name_machines(&self, hosts: &[(String, String)]) {
        let mut text: String = "127.0.0.1 localhost\n".into();
        for (address, name) in hosts {
            text += &format!("{address} {name}\n");
        }
        let server = format!(
            "nameserver {}.250\noptions timeout:5 attempts:2\n",
            self.net
        );
        for n in 1..=self.nodes {
            // `ip netns exec` shows a process these in the place of the machine's. Written in place: they are mounted.
            let etc = Path::new(ETC).join(self.namespace(n));
            fs::create_dir_all(&etc).unwrap();
            fs::write(etc.join("hosts"), &text).unwrap();
            fs::write(etc.join("resolv.conf"), &server).unwrap();
            fs::write(etc.join("nsswitch.conf"), "hosts: files dns\n").unwrap();
        }
    }

    /// Packets that cuts in force have stopped so far.
    pub fn stopped_packets(&self) -> u64 {
        (1..=self.nodes).map(|n| self.stopped_at(n)).sum()
    }

    fn stopped_at(&self, n: usize) -> u64 {
        let list = self.iptables(n, &["-nvxL", "INPUT"]);
        // Two lines of headings; the first column is the packets.
        let lines = list.lines().skip(2);
        lines
            .filter_map(|line| line.split_whitespace().next()?.parse::<u64>().ok())
            .sum()
    }

    fn filter(&self, verb: &str, cut: Cut) {
        let from = self.address(cut.from);
        let port;
        let rule: &[&str] = match cut.how {
            How::Drop => &["-j", "DROP"],
            How::Reset => &["-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset"],
            How::Lossy => &[
                "-m",
                "statistic",
                "--mode",
                "random",
                "--probability",
                "0.33",
                "-j",
                "DROP",
            ],
            How::Connect => &["-p", "tcp", "--syn", "-j", "DROP"],
            How::Port(number) => {
                port = number.to_string();
                &["-p", "tcp", "--dport", &port, "-j", "DROP"]
            }
        };
        // Where packets arrive: dropped on their way out, the sender's kernel would be told.
        self.iptables(cut.to, &[&[verb, "INPUT", "-s", &from][..], rule].concat());
    }

    fn iptables(&self, n: usize, arguments: &[&str]) -> String {
        let node = self.namespace(n);
        let whole = [&["netns", "exec", &node, "iptables", "-w"][..], arguments].concat();
        ip(&whole)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let nodes = (1..=self.nodes).map(|n| format!("n{n}"));
        for name in nodes.chain(["switch".to_string()]) {
            // One that was never made is no reason to leave the others.
            delete(&self.name(&name));
        }
    }
}

/// A namespace, and what is special in its /etc.
fn delete(name: &str) {
    let _ = run("ip", &["netns", "del", name]);
    let _ = fs::remove_dir_all(Path::new(ETC).join(name));
}

fn run(program: &str, arguments: &[&str]) -> std::io::Result<Output> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    // Debian keeps both programs where only root looks.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command.output()
}

fn ip(arguments: &[&str]) -> String {
    let output = run("ip", arguments).unwrap_or_else(|e| panic!("ip cannot be run: {e}"));
    assert!(
        output.status.success(),
        "ip {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Says what is missing, if anything is: without namespaces nothing is tested here, and that must not look like a pass.
fn may_make_networks() {
    for (program, package) in [("ip", "iproute2"), ("iptables", "iptables")] {
        let found = run(program, &["-V"]);
        assert!(
            found.is_ok_and(|o| o.status.success()),
            "this test cuts nodes off from each other and needs the program {program}: \
             install the package {package} (scripts/test does)"
        );
    }
    // SAFETY: it reads a number.
    let user = unsafe { libc::geteuid() };
    assert_eq!(
        user, 0,
        "this test gives every node a network namespace of its own, which only root may: run it as root"
    );
}

/// Removes what a test left that was killed: namespaces, and the nodes in them.
fn sweep() {
    for line in ip(&["netns", "list"]).lines() {
        let name = line.split_whitespace().next().unwrap_or_default();
        let number = name.strip_prefix(PREFIX).and_then(|n| n.split('-').next());
        if let Some(pid) = number
            && !Path::new("/proc").join(pid).exists()
        {
            // Another test may be sweeping, too, and have removed it already.
            let pids = run("ip", &["netns", "pids", name]).map(|o| o.stdout);
            let pids = String::from_utf8_lossy(&pids.unwrap_or_default()).into_owned();
            for pid in pids.split_whitespace() {
                let _ = run("kill", &["-KILL", pid]);
            }
            delete(name);
        }
    }
}
