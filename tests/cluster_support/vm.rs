//! A real guest: QEMU boots the image of `qemu/build-guest` on a volume's socket and runs a workload, whose verdict is on
//! the console. `scripts/test` installs QEMU and builds the image.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A running guest. Dropped, it is switched off.
pub struct Guest {
    child: Child,
    console: PathBuf,
}

impl Guest {
    /// Boots one on a socket with a workload of `qemu/guest/run` and its parameters; its console goes to a file.
    pub fn boot(socket: &Path, workload: &str, settings: &[&str], console: &Path) -> Guest {
        let installed = Path::new("qemu-system-x86_64");
        Guest::boot_in(installed, socket, workload, settings, console)
    }

    /// The same in a QEMU of the caller's choice.
    pub fn boot_in(
        qemu: &Path,
        socket: &Path,
        workload: &str,
        settings: &[&str],
        console: &Path,
    ) -> Guest {
        let run = Path::new(env!("CARGO_MANIFEST_DIR")).join("qemu/run-guest");
        let mut command = Command::new(run);
        command.env("QEMU", qemu);
        command.arg("--socket").arg(socket);
        command.args(["--run", workload]);
        for setting in settings {
            command.args(["--set", setting]);
        }
        command.arg("--console").arg(console).stdin(Stdio::null());
        let child = command.spawn();
        Guest {
            child: child.expect("qemu/run-guest must run; see scripts/test"),
            console: console.into(),
        }
    }

    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    /// Steps of the workload that were done.
    pub fn steps(&self) -> usize {
        let console = self.console();
        let beats = console.lines().filter(|l| l.starts_with("HEARTBEAT"));
        beats.count()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// It has been switched off.
    pub fn is_off(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// The verdict, once there is one. A bad one, or an end without one, fails the test.
    #[track_caller]
    pub fn is_content(&mut self) -> bool {
        let off = self.is_off();
        let console = self.console();
        let lines: Vec<&str> = console.lines().collect();
        let end = lines[lines.len().saturating_sub(25)..].join("\n");
        let bad = console.contains("GUEST-FAIL") || console.contains("Kernel panic");
        assert!(!bad, "the guest found a fault:\n{end}");
        let good = console.contains("GUEST-OK");
        assert!(good || !off, "the guest ended without a verdict:\n{end}");
        good
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
