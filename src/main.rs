//! The command: see [`afterimage::cli`].

fn main() -> std::process::ExitCode {
    afterimage::cli::main()
}
