//! What is in packaging/, as a machine uses it: the unit under a real systemd, and what a node tells whoever manages it.

mod cluster_support;
mod etcd_support;

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use cluster_support::client::{Load, Plan};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, PATIENCE, binary, eventually, lockstep};
use etcd_support::Etcd;
use serde_json::Value;

const SIZE: u64 = 32 << 20;

/// Its first step: a cgroup of its own, named by the process.
const OUTSIDE: &str = r#"
set -eu
mount --make-rprivate /
mkdir "$1/cgroup" "$1/root"
mount -t cgroup2 none "$1/cgroup"
mkdir "$1/cgroup/lockstep-itest-$$"
echo $$ > "$1/cgroup/lockstep-itest-$$/cgroup.procs"
exec unshare --pid --fork --kill-child --mount --cgroup --uts --ipc --net bash -c "$2" boot "$1/root" "$3" "$4"
"#;

/// Its second: a machine that has this one's programs and nothing else of it, and on which lockstep is installed as
/// packaging/lockstep.service says. The kernel's settings are everybody's, and may not be changed.
const INSIDE: &str = r#"
set -eu
root=$1
mount -t tmpfs -o mode=755 none "$root"
cd "$root"
mkdir -p proc sys dev run tmp old root usr/local/bin var/lib etc/systemd/system etc/sysusers.d etc/lockstep
for entry in /usr/*; do
    name=${entry#/usr/}
    if [ "$name" != local ] && [ -d "$entry" ]; then mkdir "usr/$name"; mount --rbind -r "$entry" "usr/$name"; fi
done
for name in bin sbin lib lib32 lib64; do
    if [ -L "/$name" ]; then cp -a "/$name" .
    elif [ -d "/$name" ]; then mkdir "$name"; mount --rbind -r "/$name" "$name"; fi
done
mount -t proc none proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro none sys
mount -t cgroup2 none sys/fs/cgroup
for place in dev run tmp; do mount -t tmpfs -o mode=755 none $place; done
mkdir dev/shm dev/pts
for device in null zero full random urandom tty ptmx; do
    touch dev/$device
    mount --bind /dev/$device dev/$device
done
echo 'root:x:0:0:root:/root:/bin/sh' > etc/passwd
echo 'root:x:0:' > etc/group
# It has been started before: nothing is enabled by itself, or brought up to date with what is in /usr.
tr -d - < /proc/sys/kernel/random/uuid > etc/machine-id
touch etc/.updated var/.updated
cp "$2" usr/local/bin/lockstep
cp "$3/lockstep.service" etc/systemd/system/
cp "$3/lockstep.sysusers" etc/sysusers.d/lockstep.conf
printf 'name = "n1"\nvhost-user-blk = ["vm1,size=32MiB"]\n' > etc/lockstep/node.toml
cat > etc/systemd/system/nothing.target <<X
[Unit]
DefaultDependencies=no
X
ip link set lo up
pivot_root . old
umount -l old
exec env -i container=test PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin /lib/systemd/systemd --unit=nothing.target
"#;

/// A machine whose first process is systemd. Dropped, it is switched off. Needs root.
struct Machine {
    dir: tempfile::TempDir,
    child: Child,
    init: u32,
}

impl Machine {
    fn boot() -> Machine {
        let dir = tempfile::tempdir().unwrap();
        let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging");
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let child = Command::new("unshare")
            .args(["--mount", "bash", "-c", OUTSIDE, "boot"])
            .args([dir.path(), Path::new(INSIDE), &binary(), &packaging])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut machine = Machine {
            dir,
            child,
            init: 0,
        };
        eventually("systemd takes commands", || {
            let ended = machine.child.try_wait().unwrap();
            let log = || fs::read_to_string(machine.dir.path().join("log"));
            assert!(ended.is_none(), "it needs root and systemd: {:?}", log());
            let pid = machine.child.id();
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
            machine.init = children.split_whitespace().next()?.parse().ok()?;
            let is_systemd = fs::read_to_string(format!("/proc/{}/comm", machine.init));
            let ready = is_systemd.is_ok_and(|name| name == "systemd\n")
                && machine.try_run("systemctl list-jobs").status.success();
            ready.then_some(())
        });
        machine
    }

    fn try_run(&self, line: &str) -> Output {
        Command::new("nsenter")
            .args(["--target", &self.init.to_string()])
            .args([
                "--mount", "--pid", "--cgroup", "--uts", "--ipc", "--net", "--",
            ])
            .args(line.split_whitespace())
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            .env_remove("LOCKSTEP_HOST")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    #[track_caller]
    fn run(&self, line: &str) -> String {
        let done = self.try_run(line);
        let journal = || {
            let output = self.try_run("journalctl --no-pager --lines 60");
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        assert!(done.status.success(), "{line}: {done:?}\n{}", journal());
        String::from_utf8(done.stdout).unwrap()
    }

    /// What systemd says of the unit.
    fn shows(&self, property: &str) -> String {
        let line = format!("systemctl show lockstep --value --property {property}");
        self.run(&line).trim().into()
    }

    /// A path of the machine, from outside.
    fn path(&self, path: &str) -> PathBuf {
        format!("/proc/{}/root{path}", self.init).into()
    }

    /// Waits until the volume is served.
    fn serves(&self) {
        eventually("vm1 is served", || {
            let done = self.try_run("lockstep volume inspect vm1 -o json");
            let volume: Value = serde_json::from_slice(&done.stdout).ok()?;
            (volume["attachment"]["phase"] == "serving").then_some(())
        });
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Empty as soon as its last process is gone.
        let cleanup = r#"
            mount --make-rprivate / && mount -t cgroup2 none "$1" && cd "$1"
            for attempt in $(seq 100); do
                find "$2" -depth -type d -exec rmdir {} + 2>/dev/null
                [ -d "$2" ] || break
                sleep 0.1
            done"#;
        let _ = Command::new("unshare")
            .args(["--mount", "bash", "-c", cleanup, "cleanup"])
            .arg(self.dir.path().join("cgroup"))
            .arg(format!("lockstep-itest-{}", self.child.id()))
            .output();
    }
}

#[test]
fn the_unit_runs_a_node_under_systemd_upgrades_and_restarts_it_under_its_guest() {
    // Given a machine on which lockstep is installed,
    let machine = Machine::boot();
    let verified = machine.try_run("systemd-analyze verify --man=no lockstep.service");
    let said = String::from_utf8_lossy(&verified.stderr);
    assert!(verified.status.success(), "{said}");
    assert!(!said.contains("lockstep.service"), "{said}");
    machine.run("systemd-sysusers");
    // when it is started, that ends when the node answers;
    machine.run("systemctl start lockstep");
    machine.run("lockstep node ls");
    machine.serves();
    // it is nobody, may nothing, and its sockets are its group's;
    let pid = machine.shows("MainPID");
    let status = machine.run(&format!("cat /proc/{pid}/status"));
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name));
        line.unwrap().split_whitespace().next().unwrap().to_string()
    };
    assert_ne!(field("Uid:"), "0");
    for (name, value) in [
        ("CapEff:", "0000000000000000"),
        ("CapBnd:", "0000000000000000"),
        ("NoNewPrivs:", "1"),
        ("Seccomp:", "2"),
    ] {
        assert_eq!(field(name), value, "{name}");
    }
    let socket = machine.path("/run/lockstep/vhost/default/vm1.sock");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&socket), 0o660);
    for dir in socket.ancestors().skip(1).take(3) {
        assert_eq!(mode(dir), 0o750, "{}", dir.display());
    }
    // a guest is served, with all that this needs (its memory, io_uring, the disk);
    let load = Load::start(&socket, Plan::mixed(), Oracle::new(SIZE));
    // a reload runs the program anew in the same process, and the guest does not notice;
    machine.run("systemctl reload lockstep");
    assert_eq!(machine.shows("MainPID"), pid);
    let events = machine.run("lockstep events");
    assert!(events.contains("took over from version"), "{events}");
    load.goes_on();
    let outcome = load.finish();
    assert_eq!(outcome.failed, 0);
    let is = |property: &str, value: &str| {
        let said = machine.shows(property);
        assert_eq!(said, value, "{property}");
    };
    is("ActiveState", "active");
    is("NRestarts", "0");
    // killed, it is started again, and has what was written;
    machine.run("systemctl kill --signal KILL lockstep");
    eventually("it is started again", || {
        (machine.shows("NRestarts") == "1" && machine.shows("ActiveState") == "active")
            .then_some(())
    });
    assert_ne!(machine.shows("MainPID"), pid);
    machine.serves();
    let load = Load::start(&socket, Plan::mixed(), outcome.oracle);
    assert_eq!(load.finish().failed, 0);
    // and asked to stop, it ends well, and stays so.
    machine.run("systemctl stop lockstep");
    is("ActiveState", "inactive");
    is("Result", "success");
    is("ExecMainStatus", "0");
}

#[test]
fn a_node_says_when_it_is_ready_again_after_an_upgrade_and_when_it_stops() {
    // Given somebody who listens to a node, and a registry that does not answer,
    let mut cluster = Cluster::empty(Path::new("/tmp"));
    let path = cluster.dir.path().join("notify.sock");
    let manager = UnixDatagram::bind(&path).unwrap();
    let hear = || {
        manager.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut text = [0; 512];
        let got = manager.recv(&mut text).expect("the node says something");
        String::from_utf8(text[..got].to_vec()).unwrap()
    };
    let nothing_was_said = || {
        manager.set_nonblocking(true).unwrap();
        let error = manager.recv(&mut [0; 512]).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        manager.set_nonblocking(false).unwrap();
    };
    let program = cluster.dir.path().join("lockstep-managed");
    let lines = format!(
        "#!/bin/sh\nNOTIFY_SOCKET={} exec {} \"$@\"\n",
        path.display(),
        binary().display()
    );
    fs::write(&program, lines).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    cluster.programs.insert(1, program);
    let mut etcd = Etcd::start(1);
    etcd.kill_all();
    cluster.registry_at = Some(etcd.location(&[1]));
    // when it is started,
    cluster.spawn_node(1);
    eventually("the node waits for its registry", || {
        cluster.log(1).contains("waiting for it").then_some(())
    });
    // then it says nothing before it can serve;
    nothing_was_said();
    etcd.restart_all();
    assert_eq!(hear().trim(), "READY=1");
    cluster.ok(1, "node ls");
    // over an upgrade it is the same process, ready again and nothing else;
    let pid = cluster.pid(1);
    cluster.ok(1, "volume create vm1 --size 32MiB");
    let socket = cluster.ok(1, "volume attach vm1");
    let load = Load::start(Path::new(socket.trim()), Plan::small(), Oracle::new(SIZE));
    nothing_was_said();
    let upgraded = cluster.json(1, "node upgrade");
    assert_eq!(upgraded["pid"], pid);
    assert_eq!(hear().trim(), "READY=1");
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    // and asked to end, it says so before it has.
    nothing_was_said();
    assert!(cluster.stop(1).success());
    assert_eq!(hear().trim(), "STOPPING=1");
    nothing_was_said();
}

/// The command line that the unit's ExecStart has, apart from the path.
#[test]
fn the_unit_starts_a_node_by_the_file_that_its_comment_names() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let unit = fs::read_to_string(root.join("packaging/lockstep.service")).unwrap();
    let start = unit.lines().find_map(|l| l.strip_prefix("ExecStart="));
    let words: Vec<&str> = start.unwrap().split_whitespace().skip(1).collect();
    assert_eq!(words, ["node", "--config", "/etc/lockstep/node.toml"]);
    // `doctor` takes the same file, as the comment says.
    let help = lockstep().args(["doctor", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    assert!(help.contains(words[2]), "{help}");
}

/// An etcd that asks for a user, and a file with ours.
fn etcd_with_a_user(dir: &Path) -> (Etcd, PathBuf) {
    let etcd = Etcd::start(1);
    for line in [
        "role add disks",
        "role grant-permission disks --prefix=true readwrite /lockstep/blue/",
        "user add root --new-user-password root",
        "user add lockstep --new-user-password secret",
        "role add root",
        "user grant-role root root",
        "user grant-role lockstep disks",
        "auth enable",
    ] {
        etcd.ok(1, &line.split(' ').collect::<Vec<&str>>());
    }
    let file = dir.join("etcd-user");
    fs::write(&file, "lockstep:secret\n").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    (etcd, file)
}

/// A `--tls-dir` for a node of this name.
fn certificates(dir: &Path, name: &str) -> PathBuf {
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().unwrap();
    let ca = rcgen::CertifiedIssuer::self_signed(params, key).unwrap();
    let params = rcgen::CertificateParams::new(vec![name.into()]).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &ca).unwrap();
    let tls = dir.join("tls");
    fs::create_dir(&tls).unwrap();
    fs::write(tls.join("ca.pem"), ca.pem()).unwrap();
    fs::write(tls.join("node.pem"), certificate.pem()).unwrap();
    fs::write(tls.join("node-key.pem"), key.serialize_pem()).unwrap();
    fs::set_permissions(tls.join("node-key.pem"), fs::Permissions::from_mode(0o600)).unwrap();
    tls
}

/// `lockstep node --config FILE` with more arguments; its log is beside the file. Dropped, it is killed.
struct FileNode {
    child: Child,
    host: String,
    log: PathBuf,
}

impl FileNode {
    fn start(file: &Path, run: &Path, more: &[&str]) -> FileNode {
        let log = file.with_extension("log");
        let out = fs::File::create(&log).unwrap();
        let child = lockstep()
            .args(["node", "--config"])
            .arg(file)
            .args(more)
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stderr(out)
            .spawn()
            .unwrap();
        let host = format!("unix:{}", run.join("api.sock").display());
        let mut node = FileNode { child, host, log };
        eventually("the node answers", || {
            let ended = node.child.try_wait().unwrap();
            assert!(ended.is_none(), "{}", node.log());
            node.run("node ls").status.success().then_some(())
        });
        node
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    fn run(&self, line: &str) -> Output {
        let mut command = lockstep();
        command.args(["--host", &self.host]).args(line.split(' '));
        command.output().unwrap()
    }

    /// The volume, once it is served.
    fn serves(&self, name: &str) -> Value {
        eventually("it is served", || {
            let done = self.run(&format!("volume inspect {name} -o json"));
            let volume: Value = serde_json::from_slice(&done.stdout).ok()?;
            (volume["attachment"]["phase"] == "serving").then_some(volume)
        })
    }

    fn stop(mut self) {
        // SAFETY: a signal to a child that was not waited for yet: the number is its own.
        assert_eq!(
            unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) },
            0
        );
        assert!(self.child.wait().unwrap().success(), "{}", self.log());
    }
}

impl Drop for FileNode {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_node_is_what_its_file_says_and_a_volume_that_differs_is_served_as_it_is() {
    // Given a file with every flag,
    let addresses = Cluster::empty(Path::new("/tmp"));
    let dir = addresses.dir.path();
    let (etcd, user) = etcd_with_a_user(dir);
    let tls = certificates(dir, "n7");
    let (data, run) = (dir.join("data"), dir.join("run"));
    let (file, socket) = (dir.join("node.toml"), dir.join("vm1.sock"));
    let (listen, http) = (addresses.listen(1), format!("{}:5705", addresses.ip(1)));
    let advertise = format!("{}:5999", addresses.ip(2));
    let write = |first: &str| {
        let text = format!(
            "name = \"n7\"\ndata-dir = {data:?}\nrun-dir = {run:?}\nlisten = \"{listen}\"\nadvertise = \"{advertise}\"\n\
             http = \"{http}\"\nregistry = \"{}/blue\"\netcd-credentials = {user:?}\ntls-dir = {tls:?}\n\
             insecure-plaintext = true\nlabel = [\"zone=a\", \"rack=7\"]\n\
             vhost-user-blk = [\"vm1,socket={},{first}\", \"vm2,size=16MiB\"]\n",
            etcd.location(&[1]),
            socket.display()
        );
        fs::write(&file, text).unwrap();
        keys_of(&file)
    };
    let keys = write("num-queues=2,size=32MiB,replicas=0,failure-mode=hard");
    let help = lockstep().args(["node", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let flags = help
        .lines()
        .filter_map(|line| line.trim().strip_prefix("--"));
    let flags = flags.filter_map(|line| line.split_whitespace().next());
    // (what names the file, or a node to talk to, is no part of it)
    let mut flags: Vec<&str> = flags
        .filter(|f| !["config", "host", "help"].contains(f))
        .collect();
    flags.sort_unstable();
    // (examples name some again)
    flags.dedup();
    assert_eq!(keys, flags);
    // doctor finds nothing wrong with it; without the password, or without etcd, it says what is;
    let doctor = |more: &[&str]| {
        let mut command = lockstep();
        command.args(["doctor", "--config"]).arg(&file).args(more);
        let done = command.output().unwrap();
        (done.status.code(), String::from_utf8(done.stdout).unwrap())
    };
    let (code, said) = doctor(&[]);
    assert_eq!(code, Some(0), "{said}");
    let location = format!("{}/blue", etcd.location(&[1]));
    assert!(
        said.contains(&format!("{location}: 0 nodes, 0 volumes")),
        "{said}"
    );
    let nobody = dir.join("nobody");
    fs::write(&nobody, "lockstep:wrong\n").unwrap();
    fs::set_permissions(&nobody, fs::Permissions::from_mode(0o600)).unwrap();
    let (code, said) = doctor(&["--etcd-credentials", nobody.to_str().unwrap()]);
    assert!(
        code == Some(11) && said.contains("is not accepted"),
        "{said}"
    );
    let https = location.replace("http:", "https:");
    let (code, said) = doctor(&["--registry", &https]);
    assert!(code == Some(11) && said.contains("TLS"), "{said}");
    let nowhere = location.replace(":2379", ":2378");
    let (code, said) = doctor(&["--registry", &nowhere]);
    assert!(
        code == Some(11) && said.contains("Connection refused") && said.contains("-> start it"),
        "{said}"
    );
    assert!(!data.exists() && !run.exists(), "doctor makes nothing");
    // when a node is started by nothing else, it is and does all that;
    let node = FileNode::start(&file, &run, &[]);
    let said = |node: &FileNode| -> Value {
        let done = node.run("node ls -o json");
        let list: Value = serde_json::from_slice(&done.stdout).unwrap();
        list[0].clone()
    };
    let is = said(&node);
    for (key, value) in [("name", "n7"), ("address", &*advertise), ("http", &*http)] {
        assert_eq!(is[key], value, "{is:#}");
    }
    assert_eq!(
        (&is["labels"]["zone"], &is["labels"]["rack"]),
        (&"a".into(), &"7".into())
    );
    let cluster = node.run("cluster status -o json");
    let cluster: Value = serde_json::from_slice(&cluster.stdout).unwrap();
    assert_eq!(cluster["registry"], *location);
    assert!(data.join("volumes").exists());
    assert!(std::net::TcpStream::connect(&listen).is_ok());
    let vm1 = node.serves("vm1");
    assert_eq!(vm1["attachment"]["socket"], socket.to_str().unwrap());
    assert_eq!(vm1["attachment"]["num_queues"], 2);
    assert_eq!(
        (&vm1["size"], &vm1["failure_mode"]),
        (&SIZE.into(), &"hard".into())
    );
    assert_eq!(node.serves("vm2")["size"], 16 << 20);
    let load = Load::start(
        &socket,
        Plan {
            queues: 2,
            ..Plan::small()
        },
        Oracle::new(SIZE),
    );
    let outcome = load.finish();
    assert_eq!(outcome.failed, 0);
    assert!(!node.log().contains("is served as it is"), "{}", node.log());
    node.stop();
    // and started again with other wishes, and a flag, it serves the volume as it is and names each difference; the flag wins.
    write("num-queues=1,size=64MiB,replicas=1,failure-mode=soft");
    let node = FileNode::start(&file, &run, &["--label", "zone=b"]);
    node.serves("vm1");
    let log = node.log();
    for difference in [
        "it has 2 queues, not 1",
        "its size is 32 MiB, not 64 MiB",
        "it has 0 replicas, not 1",
        "its failure mode is hard, not soft",
    ] {
        let line = format!("volume default/vm1 is served as it is: {difference}");
        assert!(log.contains(&line), "no {line:?} in {log}");
    }
    let labels = said(&node)["labels"].clone();
    assert_eq!(
        (&labels["zone"], &labels["rack"]),
        (&"b".into(), &"7".into())
    );
    let load = Load::start(&socket, Plan::small(), outcome.oracle);
    assert_eq!(load.finish().failed, 0);
    node.stop();
}

/// The keys of a file, in the order of the alphabet.
fn keys_of(file: &Path) -> Vec<String> {
    let text = fs::read_to_string(file).unwrap();
    let keys = text.lines().filter_map(|line| line.split_once(" = "));
    let mut keys: Vec<String> = keys.map(|(key, _)| key.to_string()).collect();
    keys.sort_unstable();
    keys
}
