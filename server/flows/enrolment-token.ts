import { encode } from '@fleetkey/protocol/cbor.ts'
import { newToken, tokenText } from '@fleetkey/protocol/enrolment-token.ts'
import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { Hello, HelloOf } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { tokenVerifier } from '@fleetkey/protocol/transcript.ts'
import { authorise } from '../access/authorise.ts'
import type { Caller } from '../access/caller.ts'
import { fail } from '../attestation/reasons.ts'
import { hasIdentity, type Device, type IdentifiedDevice } from '../fleet/device.ts'
import { tokenFault, type EnrolmentToken, type TokenUse } from '../fleet/enrolment-token.ts'
import type { Context } from './context.ts'
import { unwrapUnder, type Wrapped } from './kek.ts'
import { hex, sha256hex } from './message.ts'
import { callerName, perform, type Intent } from './perform.ts'
import { inTurn } from './turn.ts'

/** Tokens of one order, and tokens that wait to be used in all. */
const maxCount = 10_000
const maxTokens = 1_000_000
/** A token that lives longer is a password. */
const maxLife = 366 * 86_400_000

const verifierContext = (tenant: string, id: string): Uint8Array => encode(['fleetkey/1/token', tenant, id])

export const wrappedToken: Wrapped<'enrolmentToken'> = {
  table: 'enrolmentToken',
  wrapOf: ({ verifier }) => verifier,
  contextOf: (tenant, { id }) => verifierContext(tenant, id),
  withWrap: (row, verifier) => ({ ...row, verifier }),
}

export interface TokenOrder {
  readonly batch: string
  /** The one device it is for. */
  readonly device?: DeviceId | undefined
  readonly count: number
  /** Milliseconds. */
  readonly life: number
}

/** A token that was made: its text is shown this once and kept nowhere. */
export interface CreatedToken {
  readonly id: string
  readonly text: Secret
  readonly expiresAt: number
}

const checkOrder = async (ctx: Context, { batch, device, count, life }: TokenOrder): Promise<void> => {
  if (count < 1 || count > maxCount) throw new Problem('malformed', `${count} tokens: between 1 and ${maxCount} at a time`)
  if (life <= 0 || life > maxLife) throw new Problem('malformed', 'a token lives for at most 366 days')
  if ((await ctx.store.get('batch', batch)) === undefined) throw new Problem('not-found', `no batch ${batch}`)
  if ((await ctx.store.count('enrolmentToken')) + count > maxTokens)
    throw new Problem('conflict', `more than ${maxTokens} tokens: revoke those that are not needed`)
  if (device === undefined) return
  if (count !== 1) throw new Problem('malformed', 'one device needs one token')
  const row = await ctx.store.get('device', device)
  if (row === undefined || row.batch !== batch) throw new Problem('not-found', `no device ${device} in batch ${batch}`)
  if (row.state !== 'registered') throw new Problem('conflict', `device ${device} is ${row.state}: a token brings in a device that has no identity yet`)
  if ((await ctx.store.get('manifest', `serial/${row.serial}`)) === undefined)
    throw new Problem('conflict', `device ${device} has a hardware key in the manifest and enrols by that`)
}

/** Makes tokens for boards of a batch. What is stored of them checks a proof and makes none without the KMS. */
export const createTokens = async (ctx: Context, caller: Caller, order: TokenOrder): Promise<readonly CreatedToken[]> => {
  const { batch, device, count, life } = order
  const intent: Intent = { caller, action: 'enrolment-token.create', subject: device ?? batch }
  // Authorised and bounded before the KMS is asked for anything.
  authorise(caller, intent.action)
  const made = Array.from({ length: Math.min(Math.max(count, 0), maxCount) }, () => newToken(ctx.random))
  const verifiers = made.map(({ secret }) => new Secret(tokenVerifier(secret)))
  const wraps = made.map(({ id }, at) => ({ key: ctx.authority.kek, plaintext: verifiers[at] as Secret, context: verifierContext(ctx.tenant, hex(id)) }))
  const wrapped = await ctx.kms.wrap(wraps)
  for (const verifier of verifiers) verifier.destroy()
  const expiresAt = await perform(ctx, intent, async (tx) => {
    await checkOrder(ctx, order)
    const at = ctx.now()
    for (const [index, { id }] of made.entries())
      tx.insert('enrolmentToken', {
        id: hex(id),
        batch,
        device: device ?? null,
        verifier: wrapped[index] as Uint8Array,
        createdAt: at,
        createdBy: callerName(caller),
        expiresAt: at + life,
        revokedAt: null,
        spent: null,
      })
    tx.note(
      `${made.length} for batch ${batch}, until ${at + life}: ${made
        .slice(0, 20)
        .map(({ id }) => hex(id))
        .join(', ')}`,
    )
    return at + life
  })
  // A crash here: tokens that nobody was told; they expire, or are revoked.
  ctx.step('token.created')
  return made.map((token) => {
    const created = { id: hex(token.id), text: new Secret(new TextEncoder().encode(tokenText(token))), expiresAt }
    token.secret.destroy()
    return created
  })
}

/** Takes a token back that nobody has used. Throws Problem: `not-found`, `conflict` when it was used or revoked. */
export const revokeToken = async (ctx: Context, caller: Caller, id: string): Promise<void> => {
  await perform(ctx, { caller, action: 'enrolment-token.revoke', subject: id.slice(0, 64) }, async (tx) => {
    const row = await ctx.store.get('enrolmentToken', id)
    if (row === undefined) throw new Problem('not-found', `no token ${id}`)
    if (row.spent !== null) throw new Problem('conflict', `token ${id} was used by ${row.spent.device}: revoke the device`)
    if (row.revokedAt !== null) throw new Problem('conflict', `token ${id} is revoked already`)
    tx.update('enrolmentToken', { ...row, revokedAt: ctx.now() })
    tx.note(`batch ${row.batch}`)
  })
  // A crash here: it is revoked, and nobody was told.
  ctx.step('token.revoked')
}

/** A hello that a token may have to let in, as long as its device has no identity. */
const byToken = (hello: Hello): hello is HelloOf<'token'> => hello.presented.method === 'token'

/** What came back: by its LDevID key, as long as that is good. */
export const checkReturn = async (ctx: Context, device: IdentifiedDevice): Promise<void> => {
  const certificate = await ctx.store.get('certificate', device.ldevidSerial)
  if (certificate?.status !== 'valid' || certificate.notAfter < ctx.now()) fail('ldevid.expired', `LDevID certificate ${device.ldevidSerial}`)
}

/** What somebody who brings a token shows. `token`: its public half; `ldevid`: DER SubjectPublicKeyInfo of the key that becomes the device's identity. */
export type TokenPresented = Pick<HelloOf<'token'>['presented'], 'token' | 'ldevid'>

const useOf = ({ ldevid }: TokenPresented, { id, batch }: Device): TokenUse => ({ device: id, batch, key: sha256hex(ldevid) })

/** The record of a token that lets this device in with this key. Throws Problem('attestation-failed') with the reason why it does not. */
export const usableToken = async (ctx: Context, presented: TokenPresented, device: Device): Promise<EnrolmentToken> => {
  const { token } = presented
  if (token === null) return fail('token.missing', `device ${device.id} has no identity and brought no token`)
  const row = (await ctx.store.get('enrolmentToken', hex(token))) ?? fail('token.unknown', `no token ${hex(token)}`)
  const fault = tokenFault(row, useOf(presented, device), ctx.now())
  return fault === undefined ? row : fail(fault, `token ${row.id} of batch ${row.batch}`)
}

/**
 * The token that lets this device in; null when it needs none: another method, or a device that comes back with the LDevID key on its record. Throws
 * Problem('attestation-failed') with the reason why it is not let in.
 */
export const tokenFor = async (ctx: Context, hello: Hello, device: Device): Promise<EnrolmentToken | null> => {
  if (!byToken(hello)) return null
  if (!hasIdentity(device)) return await usableToken(ctx, hello.presented, device)
  await checkReturn(ctx, device)
  return null
}

/** What proofs of this token are checked with. */
export const verifierOf = async (ctx: Context, { id, verifier }: EnrolmentToken): Promise<Secret> =>
  await unwrapUnder(ctx, ctx.authority.keks, { wrapped: verifier, context: verifierContext(ctx.tenant, id) })

/**
 * Spends a token in a commit of its own, for one device and its LDevID key, before anything is issued: of many that prove it at once, one wins. The winner may
 * go on with an enrolment that was cut off; nobody else can.
 */
export const spendToken = async (ctx: Context, intent: Intent, presented: TokenPresented, device: Device): Promise<void> => {
  // In turn, and judged before the commit too: whoever comes second is told why on the record of its device.
  const spent = await inTurn(ctx.store, `token/${hex(presented.token ?? new Uint8Array())}`, async () => {
    await usableToken(ctx, presented, device)
    return await perform(ctx, { ...intent, subject: device.id }, async (tx) => {
      const row = await usableToken(ctx, presented, device)
      if (row.spent !== null) {
        tx.note(`token ${row.id} again, by the key that spent it`)
        return false
      }
      const { device: id, key } = useOf(presented, device)
      tx.update('enrolmentToken', { ...row, spent: { at: ctx.now(), device: id, key } })
      tx.note(`token ${row.id} spent`)
      return true
    })
  })
  // A crash here: the token is spent for this device and this LDevID key, which alone may come again with it.
  if (spent) ctx.step('token.spent')
}
