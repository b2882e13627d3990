//! Completions and manual pages, generated from the command line's own definition.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Command as Clap, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use super::output::write;
use super::{Cli, Failure};
use crate::cluster::fault::Fault;

const COMPLETIONS_EXAMPLE: &str = "Example:\n  \
    lockstep completions bash > /etc/bash_completion.d/lockstep\n  \
    lockstep completions zsh > /usr/local/share/zsh/site-functions/_lockstep";
const MAN_EXAMPLE: &str = "Example:\n  \
    lockstep man | man -l -\n  \
    lockstep man volume create | man -l -\n  \
    lockstep man --dir /usr/local/share/man/man1";

#[derive(Args)]
#[command(after_help = COMPLETIONS_EXAMPLE)]
pub(super) struct Completions {
    /// For which shell
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(Args)]
#[command(after_help = MAN_EXAMPLE)]
pub(super) struct Manual {
    /// The command whose page to print: volume create
    command: Vec<String>,
    /// Write the pages of all commands into this directory instead
    #[arg(long, conflicts_with = "command")]
    dir: Option<PathBuf>,
}

/// Prints the script that completes command lines.
pub(super) fn completions(args: &Completions) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "lockstep", &mut script);
    Ok(write(&String::from_utf8_lossy(&script))?)
}

/// Prints a page, or writes all.
pub(super) fn manual(args: &Manual) -> Result<(), Failure> {
    let mut root = Cli::command();
    root.build();
    if let Some(dir) = &args.dir {
        return write_all(&root, "lockstep", dir);
    }
    let (mut command, mut name) = (&root, "lockstep".to_string());
    for word in &args.command {
        let Some(next) = command.find_subcommand(word) else {
            return Err(Failure::Usage(format!(
                "'{0}' has no command '{word}'; see: {0} --help",
                name.replace('-', " ")
            )));
        };
        (command, name) = (next, format!("{name}-{word}"));
    }
    let mut page = Vec::new();
    render(command, &name, &mut page)?;
    Ok(write(&String::from_utf8_lossy(&page))?)
}

fn render(command: &Clap, name: &str, out: &mut impl Write) -> io::Result<()> {
    // The title of a page is its file's name; the synopsis has the words as they are typed.
    Man::new(command.clone())
        .title(name)
        .section("1")
        .manual("lockstep")
        .source(concat!("lockstep ", env!("CARGO_PKG_VERSION")))
        .render(out)
}

fn write_all(command: &Clap, name: &str, dir: &Path) -> Result<(), Failure> {
    let path = dir.join(format!("{name}.1"));
    let mut page = Vec::new();
    render(command, name, &mut page)?;
    std::fs::write(&path, page).map_err(|e| {
        Fault::input(format!("cannot write {}: {e}", path.display()))
            .hint("give --dir a directory that exists and that you may write")
    })?;
    let visible = |c: &&Clap| !c.is_hide_set() && c.get_name() != "help";
    for next in command.get_subcommands().filter(visible) {
        write_all(next, &format!("{name}-{}", next.get_name()), dir)?;
    }
    Ok(())
}
