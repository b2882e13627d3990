//! What to give a virtual machine monitor so that it uses an attached volume.

use std::process::{Command, Stdio};

use clap::ValueEnum;

use crate::cluster::attach::Attached;

/// Who is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Frontend {
    /// Flags of qemu-system-*
    Qemu,
    /// Flags of cloud-hypervisor
    CloudHypervisor,
    /// Elements of a libvirt domain
    Libvirt,
}

impl Frontend {
    /// What must fit the rest of the machine, for a person.
    pub(super) fn remark(self) -> &'static str {
        match self {
            Self::Qemu => {
                "size= of the memory object must be the machine's -m; the memory flags are given once; \
                 up to QEMU 9.1 it is reconnect=1, from 10.2 on reconnect-ms=1000, between them either"
            }
            Self::CloudHypervisor => "size= is the machine's memory; --memory is given once",
            Self::Libvirt => "memoryBacking is given once a domain; choose a free target dev",
        }
    }

    /// The text, for the programs of this machine.
    pub(super) fn text(self, volume: &Attached) -> String {
        let reconnect = match self {
            Self::Qemu => reconnect(&qemu_version()),
            Self::CloudHypervisor | Self::Libvirt => "",
        };
        self.text_with(volume, reconnect)
    }

    fn text_with(self, volume: &Attached, reconnect: &str) -> String {
        let path = volume.socket.display().to_string();
        let queues = volume.num_queues;
        match self {
            Self::Qemu => {
                let id = format!("disk-{}", volume.volume.replace('/', "-"));
                // QEMU reads a doubled comma as one.
                let chardev = quote(&format!(
                    "socket,id={id},path={},{reconnect}",
                    path.replace(',', ",,")
                ));
                format!(
                    "-object memory-backend-memfd,id=mem,size=1G,share=on -machine memory-backend=mem \
                     -chardev {chardev} -device vhost-user-blk-pci,chardev={id},num-queues={queues}\n"
                )
            }
            Self::CloudHypervisor => {
                let mut disk = format!("vhost_user=true,socket={path}");
                if queues > 1 {
                    disk += &format!(",num_queues={queues}");
                }
                if volume.read_only {
                    disk += ",readonly=on";
                }
                format!("--memory size=1G,shared=on --disk {}\n", quote(&disk))
            }
            Self::Libvirt => {
                let read_only = if volume.read_only {
                    "  <readonly/>\n"
                } else {
                    ""
                };
                format!(
                    "<memoryBacking>\n  <source type='memfd'/>\n  <access mode='shared'/>\n</memoryBacking>\n\
                     <disk type='vhostuser' device='disk' snapshot='no'>\n  \
                     <driver name='qemu' type='raw' queues='{queues}'/>\n  \
                     <source type='unix' path='{}'>\n    <reconnect enabled='yes' timeout='1'/>\n  </source>\n  \
                     <target dev='vda' bus='virtio'/>\n{read_only}</disk>\n",
                    escape(&path)
                )
            }
        }
    }
}

/// What the QEMU that is installed here says of its version; nothing without one.
fn qemu_version() -> String {
    let program = format!("qemu-system-{}", std::env::consts::ARCH);
    let asked = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    asked.map_or_else(
        |_| String::new(),
        |said| String::from_utf8_lossy(&said.stdout).into_owned(),
    )
}

/// How a QEMU of that version is told to connect again: by `reconnect`, which was removed in 10.2, or by `reconnect-ms`, which
/// there is since 9.2. Where nothing is known the first, as scripts know it.
fn reconnect(version: &str) -> &'static str {
    let numbers = version.strip_prefix("QEMU emulator version ").map(|rest| {
        let mut parts = rest
            .split(|c: char| !c.is_ascii_digit())
            .map(|part| part.parse().ok());
        (parts.next().flatten(), parts.next().flatten())
    });
    match numbers {
        Some((Some(major), Some(minor))) if (major, minor) >= (9u32, 2u32) => "reconnect-ms=1000",
        _ => "reconnect=1",
    }
}

/// As one word of a shell command.
fn quote(text: &str) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || "_-./,=:@+".contains(c);
    if text.chars().all(safe) {
        text.into()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('\'', "&apos;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::ids::NodeName;

    fn attached(socket: &str, num_queues: u16) -> Attached {
        Attached {
            volume: "default/vm1".into(),
            node: NodeName("n1".into()),
            socket: socket.into(),
            num_queues,
            read_only: false,
            phase: None,
            why: String::new(),
        }
    }

    #[test]
    fn the_flags_are_exact() {
        let volume = attached("/run/lockstep/vhost/default/vm1.sock", 1);
        assert_eq!(
            Frontend::Qemu.text_with(&volume, "reconnect=1"),
            "-object memory-backend-memfd,id=mem,size=1G,share=on -machine memory-backend=mem \
             -chardev socket,id=disk-default-vm1,path=/run/lockstep/vhost/default/vm1.sock,reconnect=1 \
             -device vhost-user-blk-pci,chardev=disk-default-vm1,num-queues=1\n"
        );
        assert_eq!(
            Frontend::CloudHypervisor.text(&volume),
            "--memory size=1G,shared=on --disk vhost_user=true,socket=/run/lockstep/vhost/default/vm1.sock\n"
        );
        let xml = Frontend::Libvirt.text(&attached("/a'b", 4));
        assert!(xml.contains("path='/a&apos;b'") && xml.contains("queues='4'"));
        let odd = Frontend::Qemu.text_with(&attached("/a b,c", 1), "reconnect-ms=1000");
        assert!(
            odd.contains("-chardev 'socket,id=disk-default-vm1,path=/a b,,c,reconnect-ms=1000'")
        );
    }

    #[test]
    fn each_qemu_is_told_to_connect_again_in_its_own_words() {
        let said =
            |version: &str| reconnect(&format!("QEMU emulator version {version}\nCopyright"));
        for old in ["7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", "8.0.0", "9.1.3"] {
            assert_eq!(said(old), "reconnect=1", "{old}");
        }
        for new in [
            "9.2.0",
            "10.0.2 (Debian 1:10.0.2+ds-2~bpo12+1)",
            "10.2.0",
            "11.0",
        ] {
            assert_eq!(said(new), "reconnect-ms=1000", "{new}");
        }
        for unknown in ["", "qemu: 11", "QEMU emulator version x.y"] {
            assert_eq!(reconnect(unknown), "reconnect=1", "{unknown}");
        }
    }
}
