//! A QEMU process whose monitor the test talks to.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use super::eventually;

/// The QEMUs to test with: the installed one and, where `qemu/newer` has unpacked it, one of version 10 or later.
pub fn programs() -> Vec<PathBuf> {
    let newer = repository().join("qemu/build/newer/bin/qemu-system-x86_64");
    let mut programs = vec![PathBuf::from("qemu-system-x86_64")];
    programs.extend(newer.exists().then_some(newer));
    println!("with {programs:?}");
    programs
}

/// Processors for a guest: one under a QEMU other than the installed one, whose two starve one another on a busy machine until
/// the guest's kernel loses its timer.
pub fn cpus(program: &Path) -> &'static str {
    if program.is_absolute() { "1" } else { "2" }
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// One QEMU process. Dropped, it is killed.
pub struct Qemu {
    pub child: Child,
    console: PathBuf,
    /// A socket that leads to the second serial port.
    pub control: PathBuf,
    qmp: Option<BufReader<UnixStream>>,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("--- {}\n{}", self.console.display(), self.console());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Qemu {
    /// Boots the test guest with a disk on `socket` and more arguments of `qemu/run-guest`; its files are numbered.
    pub fn start(
        program: &Path,
        dir: &Path,
        number: usize,
        socket: &Path,
        arguments: &[&str],
    ) -> Qemu {
        let file = |name: &str| dir.join(format!("{name}{number}"));
        let (console, control, qmp) = (file("console"), file("control"), file("qmp"));
        let mut command = Command::new(repository().join("qemu/run-guest"));
        command.env("QEMU", program);
        let files = [
            ("--socket", socket),
            ("--console", &console),
            ("--control", &control),
            ("--qmp", &qmp),
        ];
        for (flag, file) in files {
            command.arg(flag).arg(file);
        }
        command.args(arguments);
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu/run-guest must run; see scripts/test");
        let mut qemu = Qemu {
            child,
            console,
            control,
            qmp: None,
        };
        let stream = eventually("QEMU's monitor", || UnixStream::connect(&qmp).ok());
        let mut reader = BufReader::new(stream);
        reader.read_line(&mut String::new()).unwrap();
        qemu.qmp = Some(reader);
        qemu.ask("qmp_capabilities", json!({}));
        qemu
    }

    /// A command of the monitor, and what it returns.
    pub fn ask(&mut self, command: &str, arguments: Value) -> Value {
        self.try_ask(command, arguments)
            .unwrap_or_else(|e| panic!("{command}: {e}"))
    }

    /// The same with QEMU's complaint as the error.
    pub fn try_ask(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        let qmp = self.qmp.as_mut().unwrap();
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(qmp.get_mut(), "{request}").unwrap();
        loop {
            let mut line = String::new();
            assert!(qmp.read_line(&mut line).unwrap() > 0, "QEMU is gone");
            let mut answer: Value = serde_json::from_str(&line).unwrap();
            if answer.get("error").is_some() {
                return Err(answer["error"].take());
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
            // An event.
        }
    }

    pub fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    /// Nothing went wrong inside, and QEMU runs.
    pub fn goes_on(&mut self) {
        let console = self.console();
        let bad = ["GUEST-FAIL", "Kernel panic"]
            .iter()
            .any(|b| console.contains(b));
        let over = !console.contains("GUEST-OK") && self.child.try_wait().unwrap().is_some();
        assert!(!bad && !over, "the guest failed: {console}");
    }

    /// Waits for more looks of the guest at its memory; or until it has moved, if it was at rest for once.
    pub fn works(&mut self, more: usize) {
        let beats = |qemu: &Qemu| qemu.console().matches("HEARTBEAT").count();
        let goal = beats(self) + more;
        eventually("the guest goes on", || {
            self.goes_on();
            let moved = self.ask("query-status", json!({}))["status"] == "postmigrate";
            (beats(self) >= goal || moved).then_some(())
        });
    }

    /// Lets the writers end. Their verdict must be good.
    pub fn finish(mut self) {
        let mut control = UnixStream::connect(&self.control).unwrap();
        control.write_all(b"stop\n").unwrap();
        eventually("the guest's verdict", || {
            self.goes_on();
            self.console().contains("GUEST-OK").then_some(())
        });
        eventually("the guest switches off", || self.child.try_wait().unwrap());
    }

    pub fn speed(&mut self, (bytes, pause): (u64, u64)) {
        self.ask(
            "migrate-set-parameters",
            json!({"max-bandwidth": bytes, "downtime-limit": pause}),
        );
    }

    pub fn migration(&mut self, status: &str) {
        eventually(&format!("a migration that is {status}"), || {
            self.goes_on();
            let now = self.ask("query-migrate", json!({}));
            assert_ne!(now["status"], "failed", "{now}");
            (now["status"] == status).then_some(())
        });
    }
}
