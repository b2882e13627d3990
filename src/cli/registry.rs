//! `lockstep registry`. It talks to registries and to no node: none may run.

use std::path::PathBuf;

use clap::Subcommand;

use super::output::print;
use super::{Failure, Global, note};
use crate::cluster::fault::Fault;
use crate::cluster::registry_move::migrate;
use crate::registry::{Access, Location};

const MIGRATE_EXAMPLE: &str = "Example:\n  \
    lockstep registry migrate sqlite:/var/lib/lockstep/registry.db \\\n      \
    etcd:http://10.0.0.11:2379,http://10.0.0.12:2379,http://10.0.0.13:2379\n\n\
    Interrupted, the same command goes on. FROM keeps what it holds; a node that is started on\n\
    it says where the registry went.";

#[derive(Subcommand)]
pub(super) enum Command {
    /// Move the registry of a cluster from a file to etcd, to spread it over several machines; all nodes must be stopped
    #[command(after_help = MIGRATE_EXAMPLE)]
    Migrate {
        /// Where it is
        #[arg(value_name = "sqlite:PATH")]
        from: String,
        /// Where it goes; nothing may be there yet
        #[arg(value_name = "etcd:http://H:2379[,http://H2:2379]")]
        to: String,
        /// A file with USER:PASSWORD for etcd
        #[arg(long, value_name = "FILE")]
        etcd_credentials: Option<PathBuf>,
        /// For etcd over https: etcd-ca.pem (or ca.pem), and etcd.pem with etcd-key.pem if etcd asks for a certificate
        #[arg(long, value_name = "DIR")]
        tls_dir: Option<PathBuf>,
    },
}

pub(super) fn run(command: &Command, global: &Global) -> Result<(), Failure> {
    match command {
        Command::Migrate {
            from,
            to,
            etcd_credentials,
            tls_dir,
        } => {
            let place = |text: &String| {
                text.parse::<Location>()
                    .map_err(|e| Fault::input(e.to_string()))
            };
            let access = Access {
                tls_dir: tls_dir.clone(),
                credentials: etcd_credentials.clone(),
            };
            let done = migrate(&place(from)?, &place(to)?, &access)?;
            note(&format!(
                "{} keys of cluster {} were copied and read back; start every node with --registry {}",
                done.keys, done.cluster, done.to
            ));
            print(global.output, &done, |done| format!("{}\n", done.to))
        }
    }
}
