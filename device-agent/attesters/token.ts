import { parseToken, type EnrolmentToken } from '@fleetkey/protocol/enrolment-token.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { possessionOf, sha256, tokenProof, tokenVerifier } from '@fleetkey/protocol/transcript.ts'
import type { FileSystem } from '../filesystem.ts'
import type { SoftwareKeys } from '../software-keys.ts'
import type { AttesterBy } from './attester.ts'
import { softwareAnswer, softwareSigner } from './software.ts'

export interface TokenFile {
  readonly path: string
  readonly read: FileSystem['read']
  /** Resolves when the file is gone from the medium. */
  readonly remove: () => Promise<void>
  readonly step: (name: string) => void
  readonly log: (line: string) => void
}

/** The token in the file; null when it is gone, as it is after the first enrolment. A file that holds none is told, never shown. */
const readToken = async ({ path, read, log }: TokenFile): Promise<EnrolmentToken | null> => {
  const bytes = await read(path)
  if (bytes === undefined) return null
  try {
    return parseToken(new TextDecoder('latin1').decode(bytes))
  } catch (thrown) {
    if (!(thrown instanceof Problem)) throw thrown
    log(`${path} holds no enrolment token`)
    return null
  } finally {
    bytes.fill(0)
  }
}

/**
 * Proves the device by a single-use token when it first comes, and by its LDevID key from then on. The token never leaves this device: what is sent is an HMAC
 * over this conversation, from which nobody learns it.
 */
export const tokenAttester = (keys: SoftwareKeys, file: TokenFile): AttesterBy<'token'> => {
  const verifierFor = async (id: Uint8Array | null): Promise<Secret | null> => {
    const token = id === null ? null : await readToken(file)
    if (id === null || token === null) return null
    // Somebody laid another one there since the hello: the next hello takes it.
    if (Buffer.compare(token.id, id) !== 0) throw new Problem('conflict', 'the token was exchanged during the enrolment', { reason: 'token.exchanged' })
    const verifier = new Secret(tokenVerifier(token.secret))
    token.secret.destroy()
    return verifier
  }
  return {
    ...softwareSigner(keys),
    async hello(of) {
      const token = await readToken(file)
      token?.secret.destroy()
      return {
        type: 'hello',
        ...of,
        presented: { method: 'token', token: token?.id ?? null, ldevid: keys.ldevid.spki, recipient: keys.recipient.spki },
      }
    },
    async answer(of) {
      const { presented } = of.hello
      const verifier = await verifierFor(presented.method === 'token' ? presented.token : null)
      try {
        return await softwareAnswer('token', keys, of, sha256(keys.ldevid.spki), async (nonce, transcript) => ({
          method: 'token',
          proof: verifier === null ? null : tokenProof(verifier, nonce, transcript),
          signature: await keys.ldevid.sign(possessionOf('ldevid', nonce, transcript)),
        }))
      } finally {
        verifier?.destroy()
      }
    },
    async enrolled() {
      if ((await file.read(file.path)) === undefined) return
      await file.remove()
      // A crash here: the token is spent, its file is gone.
      file.step('token.deleted')
    },
  }
}
