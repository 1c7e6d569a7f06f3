/** Where the software TPM may answer otherwise than swtpm, each with its reason. Everything else must be of the same class. */
interface Deviation {
  readonly why: string
  readonly is: (command: Buffer, theirs: number, ours: number) => boolean
}

/** Every command of libtpms 0.9.2 that neither the agent nor enrolment by tpm2-tools uses. */
export const notOurs: ReadonlySet<number> = new Set([
  0x11f, 0x121, 0x124, 0x125, 0x12b, 0x12c, 0x12d, 0x130, 0x132, 0x133, 0x13f, 0x140, 0x149, 0x14d, 0x152, 0x159, 0x164, 0x16d, 0x172, 0x174, 0x178, 0x183,
  0x187, 0x18b, 0x18d, 0x18e, 0x190, 0x191, 0x192, 0x193, 0x197,
])

const unknownCommand = 0x143
const contextLoad = 0x161
/** TPM_RC_SIZE for bytes behind the last parameter; TPM_RC_INSUFFICIENT in the first parameter. */
const wrongLengths = [0x95, 0x1da]
const base = (rc: number): number => rc & 0xbf
const [scheme, symmetric, type, curve] = [0x92, 0x96, 0x8a, 0xa6]

const deviations: readonly Deviation[] = [
  { why: 'a command that is not implemented', is: (command, _, ours) => ours === unknownCommand && notOurs.has(command.readUInt32BE(6)) },
  {
    why: 'an algorithm, curve or kind of object that is not implemented: refused where its name is read',
    is: (_, theirs, ours) => (theirs === 0 || (theirs & 0x80) !== 0) && [scheme, symmetric, type, curve].includes(base(ours)) && theirs !== ours,
  },
  {
    why: 'the saved context of swtpm is longer: the same change of its length is too much for one and too little for the other',
    is: (command, theirs, ours) => command.readUInt32BE(6) === contextLoad && wrongLengths.includes(theirs) && wrongLengths.includes(ours),
  },
]

/** The reason why these two answers to a command may differ; undefined: they may not. */
export const deviationOf = (command: Uint8Array, theirs: number, ours: number): string | undefined =>
  deviations.find(({ is }) => is(Buffer.from(command), theirs, ours))?.why
