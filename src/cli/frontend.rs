//! What to give a virtual machine monitor so that it uses an attached volume.

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
                "size= of the memory object must be the machine's -m; the memory flags are given once; from QEMU 9.2 on \
                 reconnect=1 is called reconnect-ms=1000"
            }
            Self::CloudHypervisor => "size= is the machine's memory; --memory is given once",
            Self::Libvirt => "memoryBacking is given once a domain; choose a free target dev",
        }
    }

    /// The text.
    pub(super) fn text(self, volume: &Attached) -> String {
        let path = volume.socket.display().to_string();
        let queues = volume.num_queues;
        match self {
            Self::Qemu => {
                let id = format!("disk-{}", volume.volume.replace('/', "-"));
                // QEMU reads a doubled comma as one.
                let chardev = quote(&format!(
                    "socket,id={id},path={},reconnect=1",
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
            Frontend::Qemu.text(&volume),
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
        let odd = Frontend::Qemu.text(&attached("/a b,c", 1));
        assert!(odd.contains("-chardev 'socket,id=disk-default-vm1,path=/a b,,c,reconnect=1'"));
    }
}
