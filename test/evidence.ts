import { execFile } from 'node:child_process'
import { createHash, generateKeyPairSync, randomBytes, sign, type KeyObject } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { marshalAttest, marshalSignature, type Attest } from '@fleetkey/tpm2/attest.ts'
import { alg, handle } from '@fleetkey/tpm2/constants.ts'
import { signerPublic } from '@fleetkey/tpm2/firmware.ts'
import { nameOf, qualifiedName } from '@fleetkey/tpm2/names.ts'
import { marshalPublic, type EccPublic } from '@fleetkey/tpm2/structures.ts'
import { templates } from '@fleetkey/tpm2/templates.ts'
import { startSwtpm, type RunningSwtpm } from './swtpm.ts'

/** swtpm driven by tpm2-tools, and openssl, in a folder of their own: evidence that none of our code made. */
export interface Workshop {
  readonly swtpm: RunningSwtpm
  at(name: string): string
  bytes(name: string): Uint8Array
  write(name: string, content: string | Uint8Array): string
  /** A tool of tpm2-tools, its transient objects flushed first. */
  tpm(name: string, ...args: string[]): Promise<string>
  openssl(...args: string[]): Promise<string>
  close(): Promise<void>
}

export const openWorkshop = async (): Promise<Workshop> => {
  const swtpm = await startSwtpm()
  const folder = mkdtempSync(join(tmpdir(), 'fk-evidence-'))
  const at = (name: string): string => join(folder, name)
  const run = async (name: string, args: readonly string[]): Promise<string> => {
    try {
      const env = { ...process.env, TPM2TOOLS_TCTI: swtpm.tcti, TSS2_LOG: 'all+none' }
      return (await promisify(execFile)(name, [...args], { cwd: folder, env })).stdout
    } catch (error) {
      const { stdout = '', stderr = '' } = error as { stdout?: string; stderr?: string }
      throw new Error(`${name} ${args.join(' ')}: ${stdout}${stderr}`, { cause: error })
    }
  }
  return {
    swtpm,
    at,
    bytes: (name) => new Uint8Array(readFileSync(at(name))),
    write(name, content) {
      writeFileSync(at(name), content)
      return at(name)
    },
    async tpm(name, ...args) {
      await run('tpm2_flushcontext', ['-t'])
      return await run(name, args)
    },
    openssl: async (...args) => await run('openssl', args),
    async close() {
      await swtpm.stop()
      rmSync(folder, { recursive: true, force: true })
    },
  }
}

/** A key in software whose public area says what it likes: what an attacker without a TPM has. */
export interface Impostor {
  readonly public: Uint8Array
  readonly key: KeyObject
  /** Signs what it likes, too. */
  sign(attest: Uint8Array): Uint8Array
}

export const impostor = (change: Partial<EccPublic> = {}): Impostor => {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const jwk = publicKey.export({ format: 'jwk' })
  const bytes = (text = ''): Uint8Array => new Uint8Array(Buffer.from(text, 'base64url'))
  return {
    public: marshalPublic({ ...templates.ak, x: bytes(jwk.x), y: bytes(jwk.y), ...change }),
    key: privateKey,
    sign(attest) {
      const raw = new Uint8Array(sign('sha256', attest, { key: privateKey, dsaEncoding: 'ieee-p1363' }))
      return marshalSignature({ scheme: alg.ecdsa, hash: alg.sha256, r: raw.subarray(0, 32), s: raw.subarray(32) })
    },
  }
}

export const nonce = new Uint8Array(createHash('sha256').update('nonce of the verifier').digest())
export const zeros = new Uint8Array(32)

/** A quote of PCRs 0 to 2, all zero, as a TPM would make it with this AK. */
export const quoteBy = (ak: Impostor, change: Partial<Extract<Attest, { type: 'quote' }>> = {}): { quote: Uint8Array; signature: Uint8Array } => {
  const quote = marshalAttest({
    type: 'quote',
    qualifiedSigner: qualifiedName(handle.endorsement, nameOf(ak.public)),
    extraData: nonce,
    clockInfo: { clock: 1_000n, resetCount: 5, restartCount: 1, safe: true },
    firmwareVersion: 0x0007_0055_0001_0002n,
    selection: [{ hash: alg.sha256, pcrs: [0, 1, 2] }],
    pcrDigest: new Uint8Array(createHash('sha256').update(zeros).update(zeros).update(zeros).digest()),
    ...change,
  })
  return { quote, signature: ak.sign(quote) }
}

export const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
export const flip = (bytes: Uint8Array, at = bytes.length - 1): Uint8Array => bytes.map((byte, index) => (index === at ? byte ^ 1 : byte))

/** Titles of numbered cases (number, reason code, …), none twice. */
export const caseTitles = (rows: readonly (readonly [number, string, ...unknown[]])[]): readonly string[] => {
  const seen = new Map<string, number>()
  return rows.map(([number, reason]) => {
    const title = `case ${number}: ${reason}`
    const times = (seen.get(title) ?? 0) + 1
    seen.set(title, times)
    return times === 1 ? title : `${title}, in another way (${times})`
  })
}

/** A key that approves firmware, as the TPM would load it. */
export const approving = (): Uint8Array => {
  const { x = '', y = '' } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' }).publicKey.export({ format: 'jwk' })
  return signerPublic(new Uint8Array(Buffer.from(x, 'base64url')), new Uint8Array(Buffer.from(y, 'base64url')))
}
