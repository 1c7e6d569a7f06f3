import { randomBytes } from 'node:crypto'
import { join } from 'node:path'
import { ck, loadAddon } from '@fleetkey/server/kms/pkcs11/cryptoki.ts'
import type { Pkcs11Backend } from '@fleetkey/server/kms/orders.ts'
import { startKms } from '@fleetkey/server/kms/supervisor.ts'
import { hasSoftHsm, openSoftHsm, pin } from '../test/softhsm.ts'

/** Signatures a second by the clock, median of the rounds; and the median of what each round's are of the bare loop's beside it. */
export interface HsmFigures {
  readonly rate: number
  readonly floor: number
  readonly ratio: number
}

const rounds = 7

const median = (values: readonly number[]): number => values.toSorted((one, other) => one - other)[Math.floor(values.length / 2)] ?? 0

/** Signs in this process, one after the other, with the one private key that the token has. */
const bareLoop = ({ addon, module, token }: Pkcs11Backend): ((count: number) => void) => {
  const cryptoki = loadAddon(addon)
  cryptoki.load(module)
  cryptoki.C_Initialize({ flags: ck.initialize.osLocking })
  const slot = cryptoki.C_GetSlotList(true).find((one) => cryptoki.C_GetTokenInfo(one).label.trim() === token)
  if (slot === undefined) throw new Error('no token')
  const session = cryptoki.C_OpenSession(slot, ck.session.serial)
  cryptoki.C_Login(session, ck.user, pin)
  cryptoki.C_FindObjectsInit(session, [{ type: ck.attribute.class, value: ck.object.privateKey }])
  const [key] = cryptoki.C_FindObjects(session, 2)
  cryptoki.C_FindObjectsFinal(session)
  if (key === undefined) throw new Error('no key')
  const [digest, out] = [randomBytes(32), Buffer.alloc(64)]
  return (count) => {
    for (let at = 0; at < count; at++) {
      cryptoki.C_SignInit(session, { mechanism: ck.mechanism.ecdsa, parameter: null }, key)
      cryptoki.C_Sign(session, digest, out)
    }
  }
}

/**
 * Signing through the KMS process (socket, policy, counts, a pool of sessions) on SoftHSM, beside the bare C_SignInit and C_Sign loop of one thread on the same key.
 * Undefined where SoftHSM is not installed.
 */
export const measureSoftHsm = async (folder: string, signatures: number): Promise<HsmFigures | undefined> => {
  if (!hasSoftHsm()) return undefined
  const { backend } = openSoftHsm(folder)
  Object.assign(process.env, backend.variables)
  const kms = await startKms({ folder: join(folder, 'kms'), backend, log: () => undefined })
  try {
    await kms.create('bench', 'delivery-signing')
    // As TBSCertificates are: a few hundred bytes, in batches of what comes at a time.
    const batch = Array.from({ length: 64 }, () => ({ key: 'bench', purpose: 'delivery-signing' as const, data: randomBytes(400).fill(0x84, 0, 1) }))
    const through = async (count: number): Promise<void> => {
      let left = count / batch.length
      await Promise.all(
        Array.from({ length: 4 }, async () => {
          while (left-- > 0) await kms.sign(batch)
        }),
      )
    }
    const bare = bareLoop(backend)
    const rateOf = async (work: () => unknown): Promise<number> => {
      const started = performance.now()
      await work()
      return (signatures / (performance.now() - started)) * 1000
    }
    bare(signatures)
    await through(signatures)
    const pairs: { readonly floor: number; readonly rate: number }[] = []
    for (let round = 0; round < rounds; round++)
      pairs.push({ floor: await rateOf(() => bare(signatures)), rate: await rateOf(async () => await through(signatures)) })
    return {
      rate: median(pairs.map(({ rate }) => rate)),
      floor: median(pairs.map(({ floor }) => floor)),
      ratio: median(pairs.map(({ rate, floor }) => rate / floor)),
    }
  } finally {
    await kms.close()
  }
}
