import { randomBytes } from 'node:crypto'
import { writeFileSync } from 'node:fs'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { certificateBytes } from '@fleetkey/protocol/x509/pem.ts'
import { exit, readInput, required, text, UsageError, type Command, type Invocation } from '../command.ts'
import {
  appraiseOffline,
  credentialFile,
  endorsementsOf,
  readOfflinePolicy,
  selectionOf,
  type OfflineEvidence,
  type OfflinePolicy,
  type OfflineVerdict,
} from '../offline/attest.ts'
import { facts } from '../output.ts'

const string = { type: 'string' } as const

const file = (call: Invocation, option: string): Uint8Array => new Uint8Array(readInput(required(text(call, option), `--${option} FILE`)))
const optional = (call: Invocation, option: string): Uint8Array | undefined => (text(call, option) === undefined ? undefined : file(call, option))

const hexOf = (call: Invocation, option: string): Uint8Array => {
  const given = required(text(call, option), `--${option} HEX`)
  if (!/^([0-9a-fA-F]{2})*$/.test(given)) throw new UsageError(`--${option} takes hex digits in pairs`)
  return new Uint8Array(Buffer.from(given, 'hex'))
}

/** A file that is no file of its kind is a mistake on the command line, not evidence that is refused. */
const usable = <T>(option: string, read: () => T): T => {
  try {
    return read()
  } catch (error) {
    if (error instanceof UsageError) throw error
    throw new UsageError(`--${option}: ${error instanceof Error ? error.message : String(error)}`)
  }
}

const policyOf = (call: Invocation): OfflinePolicy | undefined => {
  const bytes = optional(call, 'policy')
  if (bytes === undefined) return undefined
  const read = usable('policy', () => readOfflinePolicy(JSON.parse(Buffer.from(bytes).toString('utf8'))))
  if (!read.success) throw new UsageError(`--policy: ${read.error.issues[0]?.path.join('.') ?? ''}: ${read.error.issues[0]?.message ?? ''}`)
  return read.data
}

const ekCertificateOf = (call: Invocation): OfflineEvidence['ekCertificate'] => {
  const certificate = optional(call, 'ek-cert')
  if (certificate === undefined) return undefined
  const roots = file(call, 'roots')
  return {
    certificate: usable('ek-cert', () => certificateBytes(certificate)),
    endorsements: usable('roots', () => endorsementsOf(Buffer.from(roots).toString('latin1'))),
  }
}

const evidenceOf = (call: Invocation): OfflineEvidence => {
  const selection = selectionOf(required(text(call, 'pcrs'), '--pcrs BANK:INDEX,…'))
  if (selection === undefined) throw new UsageError('--pcrs takes one bank and its PCRs: sha256:0,1,2')
  const [values, eventLog, ima, ek, ekCertificate, policy] = [
    optional(call, 'pcr-values'),
    optional(call, 'event-log'),
    optional(call, 'ima'),
    optional(call, 'ek'),
    ekCertificateOf(call),
    policyOf(call),
  ]
  return {
    ak: file(call, 'ak'),
    quote: file(call, 'quote'),
    signature: file(call, 'signature'),
    nonce: hexOf(call, 'nonce'),
    selection,
    ...(values === undefined ? {} : { pcrValues: Buffer.from(values).toString('utf8') }),
    ...(eventLog === undefined ? {} : { eventLog }),
    ...(ima === undefined ? {} : { ima }),
    ...(ek === undefined ? {} : { ek }),
    ...(ekCertificate === undefined ? {} : { ekCertificate }),
    ...(policy === undefined ? {} : { policy }),
  }
}

const say = (verdict: OfflineVerdict): string => {
  if (verdict.verdict === 'refused') return `REFUSED ${verdict.reason}: ${verdict.detail}`
  const { pcrs, ak, ek, ima, ...rest } = verdict.claims
  return facts({
    verdict: 'accepted',
    ak: `${ak.algorithm} ${ak.name}`,
    ...rest,
    ek: ek === null ? null : `${ek.manufacturer} ${ek.model} ${ek.version}, vouched for by ${ek.endorsement}`,
    ima: ima === null ? null : `${ima.proven} entries proven, ${ima.pending} behind the quote`,
    ...Object.fromEntries(Object.entries(pcrs ?? {}).map(([pcr, value]) => [`PCR ${pcr}`, value])),
  })
}

export const attestCommands: readonly Command[] = [
  {
    name: 'attest verify',
    usage:
      '--ak FILE --quote FILE --signature FILE --nonce HEX --pcrs sha256:0,1,2,… [--pcr-values FILE] [--event-log FILE] [--ima FILE] [--ek FILE] [--ek-cert FILE --roots FILE] [--policy FILE]',
    summary: "judge a TPM's quote offline, inputs in the TPM's own encodings; exit 3 when it is refused",
    args: [0, 0],
    options: {
      ak: string,
      quote: string,
      signature: string,
      nonce: string,
      pcrs: string,
      'pcr-values': string,
      'event-log': string,
      ima: string,
      ek: string,
      'ek-cert': string,
      roots: string,
      policy: string,
    },
    run(call) {
      const verdict = appraiseOffline(evidenceOf(call), Date.now())
      call.out.result(verdict, () => say(verdict))
      return Promise.resolve(verdict.verdict === 'accepted' ? exit.ok : exit.refused)
    },
  },
  {
    name: 'attest make-credential',
    usage: '--ek FILE --ak FILE --secret HEX [--out FILE]',
    summary: 'a credential that only the TPM with this EK and AK opens (tpm2_activatecredential); exit 3 when the EK is none',
    args: [0, 0],
    options: { ek: string, ak: string, secret: string, out: string },
    run(call) {
      const of = { ek: file(call, 'ek'), ak: file(call, 'ak'), secret: hexOf(call, 'secret') }
      try {
        const credential = credentialFile({ ...of, random: (length) => new Uint8Array(randomBytes(length)) })
        const path = text(call, 'out')
        const bytes = Buffer.from(credential)
        if (path !== undefined) usable('out', () => writeFileSync(path, bytes, { mode: 0o600 }))
        const out = path === undefined ? { credential: bytes.toString('base64') } : { out: path, bytes: bytes.length }
        call.out.result(out, () => (path === undefined ? bytes.toString('base64') : `${bytes.length} bytes written to ${path}`))
        return Promise.resolve(exit.ok)
      } catch (error) {
        if (!(error instanceof Problem) || error.reason === undefined) throw error instanceof Error ? new UsageError(error.message) : error
        const refused = { verdict: 'refused', reason: error.reason, detail: error.message } as const
        call.out.result(refused, () => `REFUSED ${refused.reason}: ${refused.detail}`)
        return Promise.resolve(exit.refused)
      }
    },
  },
]
