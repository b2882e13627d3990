//! `lockstep events`.

use clap::Args;

use super::output::{Format, Table, or_dash, print, write};
use super::remote::encode;
use super::{Failure, Global, yaml};
use crate::cluster::events::Event;
use crate::cluster::fault::Fault;

const EXAMPLE: &str = "Example:\n  lockstep events\n  lockstep events -f --volume vm1 -o json";

/// Events shown before those that follow.
const BEFORE_FOLLOWING: u32 = 10;
/// Events shown without `--follow`.
const SHOWN: u32 = 100;

#[derive(Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Command {
    /// Go on as they happen; with -o json, one object a line
    #[arg(short, long)]
    follow: bool,
    /// Of this volume only
    #[arg(long, value_name = "NAME")]
    volume: Option<String>,
    /// How many past events to show [default: 100; with --follow: 10]
    #[arg(long, value_name = "N")]
    limit: Option<u32>,
}

pub(super) fn run(command: &Command, global: &Global) -> Result<(), Failure> {
    let shown = if command.follow {
        BEFORE_FOLLOWING
    } else {
        SHOWN
    };
    let mut path = format!("/api/v1/events?limit={}", command.limit.unwrap_or(shown));
    if let Some(volume) = &command.volume {
        let name = global.volume(volume)?.to_string();
        path += &format!("&volume={}", encode(&name));
    }
    if !command.follow {
        let events: Vec<Event> = global.remote().get(&path)?;
        return print(global.output, &events, |events| table(events));
    }
    let mut done = Ok(());
    global
        .remote()
        .lines(&format!("{path}&follow=true"), |line| {
            done = follow(global.output, line);
            done.is_ok()
        })?;
    done?;
    Err(Fault::try_again("the node ended the stream of events")
        .hint("it is stopping, or was restarted; run the command again")
        .into())
}

fn follow(format: Format, line: &str) -> Result<(), Failure> {
    let text = match format {
        Format::Json => format!("{line}\n"),
        Format::Yaml => match serde_json::from_str(line) {
            Ok(value) => format!("---\n{}", yaml::emit(&value)),
            Err(_) => return Ok(()),
        },
        Format::Table => match serde_json::from_str::<Event>(line) {
            Ok(event) => format!("{}\n", one_line(&event)),
            // A newer node may send what this version does not know.
            Err(_) => format!("{line}\n"),
        },
    };
    Ok(write(&text)?)
}

fn epoch(event: &Event) -> String {
    event
        .what
        .epoch
        .map_or_else(|| "-".into(), |e| e.to_string())
}

fn table(events: &[Event]) -> String {
    let mut table = Table::new(&[
        "TIME", "NODE", "VOLUME", "FROM", "TO", "RULE", "EPOCH", "TEXT",
    ]);
    for event in events {
        table.row(vec![
            event.time.clone(),
            event.node.to_string(),
            or_dash(event.what.volume.as_deref().unwrap_or_default()),
            or_dash(&event.what.from),
            or_dash(&event.what.to),
            or_dash(&event.what.rule),
            epoch(event),
            event.what.text.clone(),
        ]);
    }
    table.text()
}

fn one_line(event: &Event) -> String {
    format!(
        "{} {} {} {} -> {} ({}, epoch {}) {}",
        event.time,
        event.node,
        or_dash(event.what.volume.as_deref().unwrap_or_default()),
        or_dash(&event.what.from),
        or_dash(&event.what.to),
        or_dash(&event.what.rule),
        epoch(event),
        event.what.text
    )
    .trim_end()
    .to_string()
}
