//! What an operator types to vmctl itself while a terminal is the guest's: `~.` and its like at the beginning of a line, as in ssh(1).

/// What [`Escapes`] knows, for the operator.
pub(crate) const HELP: &str = "At the beginning of a line: ~. leaves, ~~ sends a ~, ~? shows this.";

/// Where in a line the operator is.
#[derive(Debug)]
pub(crate) struct Escapes {
    line_start: bool,
    /// A `~` at the beginning of a line, which is held until it is clear what it is for.
    tilde: bool,
}

/// What became of some bytes that were typed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Typed {
    /// For the guest.
    pub(crate) send: Vec<u8>,
    /// The operator asks for [`HELP`].
    pub(crate) help: bool,
    /// The operator leaves. What was typed after that is for nobody.
    pub(crate) leave: bool,
}

impl Escapes {
    pub(crate) fn new() -> Self {
        Self { line_start: true, tilde: false }
    }

    pub(crate) fn take(&mut self, bytes: &[u8]) -> Typed {
        let mut typed = Typed::default();
        for &byte in bytes {
            match (std::mem::take(&mut self.tilde), byte) {
                (true, b'.') => {
                    typed.leave = true;
                    return typed;
                }
                (true, b'?') => typed.help = true,
                (false, b'~') if self.line_start => self.tilde = true,
                (tilde, byte) => {
                    if tilde && byte != b'~' {
                        typed.send.push(b'~');
                    }
                    typed.send.push(byte);
                    self.line_start = matches!(byte, b'\r' | b'\n');
                }
            }
        }
        typed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_has_no_tilde_at_a_beginning_arrives_as_it_is(lines in proptest::collection::vec("[^~\r\n][^\r\n]*", 0..8)) {
            let bytes = lines.join("\r").into_bytes();
            prop_assert_eq!(Escapes::new().take(&bytes), Typed { send: bytes, ..Typed::default() });
        }
    }

    /// What becomes of `bytes`, typed at once and key by key.
    fn typed(bytes: &str) -> (String, bool, bool) {
        let whole = Escapes::new().take(bytes.as_bytes());
        let (mut by_key, mut keys) = (Typed::default(), Escapes::new());
        for byte in bytes.bytes() {
            let Typed { send, help, leave } = keys.take(&[byte]);
            by_key.send.extend(send);
            by_key.help |= help;
            by_key.leave = leave;
            if leave {
                break;
            }
        }
        assert_eq!(whole, by_key, "{bytes:?}");
        (String::from_utf8(whole.send).unwrap(), whole.help, whole.leave)
    }

    #[test]
    fn a_tilde_at_the_beginning_of_a_line_is_for_vmctl() {
        for (bytes, sent, help, leave) in [
            ("~.", "", false, true),
            ("ls\r~.rest", "ls\r", false, true),
            ("ls\n~.", "ls\n", false, true),
            ("ls ~.\r", "ls ~.\r", false, false),
            ("~~.\r", "~.\r", false, false),
            ("~?~.", "", true, true),
            ("~/bin/x\r", "~/bin/x\r", false, false),
            ("~\r~.", "~\r", false, true),
            ("~", "", false, false),
            ("\x03~.", "\x03~.", false, false),
        ] {
            assert_eq!(typed(bytes), (sent.into(), help, leave), "{bytes:?}");
        }
    }
}
