import { u32 } from './bytes.ts'
import { alg } from './constants.ts'
import { algorithmsOf, banksOf, commandsOf, curvesOf, missingIn, properties, property, type Missing } from './capabilities.ts'
import { readClockState, type ClockState } from './clock.ts'
import { readEkCertificates, type FoundEk } from './ek-certificates.ts'
import { lockoutOf, type Lockout } from './lockout.ts'
import type { Tpm } from './tpm.ts'

/** What a TPM is and has. Nothing in here is signed: it is for the person before the machine, not for a verifier. */
export interface TpmReport {
  /** Four letters of the TCG vendor registry, such as `IFX`. */
  readonly manufacturer: string
  readonly vendor: string
  readonly firmware: string
  /** Revision of the library specification, such as `1.38`. */
  readonly revision: string
  readonly limits: {
    readonly nvBuffer: number | null
    readonly digest: number | null
    readonly inputBuffer: number | null
    readonly command: number | null
    readonly response: number | null
    readonly transientObjects: number | null
    readonly loadedSessions: number | null
    readonly persistentObjects: number | null
  }
  /** Loaded and not flushed: of a predecessor that crashed, or of others. Null behind a resource manager, which hides them. */
  readonly leftOver: { readonly objects: number; readonly sessions: number } | null
  readonly banks: readonly { readonly hash: number; readonly name: string; readonly pcrs: readonly number[] }[]
  readonly curves: readonly number[]
  readonly missing: readonly Missing[]
  readonly ekCertificates: readonly FoundEk[]
  readonly lockout: Lockout
  readonly clock: ClockState
  readonly persistent: readonly number[]
  /** Hierarchies whose owner has set a password. */
  readonly passwordSet: { readonly owner: boolean; readonly endorsement: boolean; readonly lockout: boolean }
  /** Hierarchies that the firmware has switched off cannot be used until the next start. */
  readonly enabled: { readonly owner: boolean; readonly endorsement: boolean }
  readonly managed: boolean
}

const hashNames: Readonly<Record<number, string>> = {
  [alg.sha1]: 'sha1',
  [alg.sha256]: 'sha256',
  [alg.sha384]: 'sha384',
  [alg.sha512]: 'sha512',
  0x0012: 'sm3-256',
  0x0027: 'sha3-256',
  0x0028: 'sha3-384',
  0x0029: 'sha3-512',
}

const text = (words: readonly (number | undefined)[]): string =>
  Buffer.concat(words.map((word) => u32(word ?? 0)))
    .toString('latin1')
    .replaceAll(/[^\x20-\x7e]/g, '')
    .replaceAll(/\s+/g, ' ')
    .trim()

/** Four numbers: the upper and lower half of both words (what makers print). */
const version = (first = 0, second = 0): string => [first >>> 16, first & 0xffff, second >>> 16, second & 0xffff].join('.')

const identity = (fixed: ReadonlyMap<number, number>): Pick<TpmReport, 'manufacturer' | 'vendor' | 'firmware' | 'revision'> => ({
  manufacturer: text([fixed.get(property.manufacturer)]),
  vendor: text([0, 1, 2, 3].map((at) => fixed.get(property.vendorString + at))),
  firmware: version(fixed.get(property.firmware1), fixed.get(property.firmware2)),
  revision: ((fixed.get(property.revision) ?? 0) / 100).toFixed(2),
})

const limits = (fixed: ReadonlyMap<number, number>): TpmReport['limits'] => ({
  nvBuffer: fixed.get(property.nvBufferMax) ?? null,
  digest: fixed.get(property.maxDigest) ?? null,
  inputBuffer: fixed.get(property.inputBuffer) ?? null,
  command: fixed.get(property.maxCommand) ?? null,
  response: fixed.get(property.maxResponse) ?? null,
  transientObjects: fixed.get(property.transientMin) ?? null,
  loadedSessions: fixed.get(property.loadedMin) ?? null,
  persistentObjects: fixed.get(property.persistentMin) ?? null,
})

/** Asks a TPM what it is. Changes nothing but that it starts one that nobody has started. Errors as of `Tpm`. */
export const inspectTpm = async (tpm: Tpm): Promise<TpmReport> =>
  await tpm.exclusive(async () => {
    await tpm.startup()
    const [fixed, variable] = [await properties(tpm, 0x100), await properties(tpm, 0x200)]
    const banks = await banksOf(tpm)
    const curves = await curvesOf(tpm)
    const [permanent, startup] = [variable.get(property.permanent) ?? 0, variable.get(property.startupClear) ?? 0]
    return {
      ...identity(fixed),
      limits: limits(fixed),
      leftOver: tpm.isManaged ? null : { objects: (await tpm.handles(0x8000_0000)).length, sessions: (await tpm.handles(0x0200_0000)).length },
      banks: banks.map(({ hash, pcrs }) => ({ hash, pcrs, name: hashNames[hash] ?? `0x${hash.toString(16).padStart(4, '0')}` })),
      curves: [...curves],
      missing: missingIn({ commands: await commandsOf(tpm), algorithms: await algorithmsOf(tpm), curves, banks }),
      ekCertificates: await readEkCertificates(tpm),
      lockout: lockoutOf(variable),
      clock: await readClockState(tpm),
      persistent: await tpm.handles(0x8100_0000),
      passwordSet: { owner: (permanent & 1) !== 0, endorsement: (permanent & 2) !== 0, lockout: (permanent & 4) !== 0 },
      enabled: { owner: (startup & 2) !== 0, endorsement: (startup & 4) !== 0 },
      managed: tpm.isManaged,
    }
  })
