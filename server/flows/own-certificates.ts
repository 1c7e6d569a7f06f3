import { Problem } from '@fleetkey/protocol/problem.ts'
import { parseCertificate, type Certificate } from '@fleetkey/protocol/x509/certificate.ts'
import type { Role } from '@fleetkey/protocol/x509/roles.ts'
import type { Caller } from '../access/caller.ts'
import { activeOf, published } from '../ca/rollover.ts'
import { roleOrder, roleSetting, rolloverOf, roles, setRollover } from './authority.ts'
import type { Context } from './context.ts'
import { certifyAgain, prepareCertificates, recordIssued, type Issuer } from './issue.ts'
import { perform, type Intent } from './perform.ts'
import { inOrder, subjectOf } from './rollover.ts'
import { announceTrust } from './trust.ts'

const system: Caller = { kind: 'system', id: 'certificates', from: 'server' }

/**
 * Whether a certificate of the server's own is to be replaced: half of its life is over, and a new one would last longer. What ends with its CA is left alone:
 * only the next CA has more to give.
 */
export const isDue = ({ notBefore, notAfter }: Pick<Certificate, 'notBefore' | 'notAfter'>, { until }: Pick<Issuer, 'until'>, now: number): boolean =>
  notAfter - now < (notAfter - notBefore) / 2 && notAfter < until

const dueRoles = ({ authority, now }: Context): readonly Role[] =>
  roles.filter((role) => isDue(parseCertificate(authority.roles[role].certificate), authority, now()))

/**
 * Certifies the keys anew that sign messages, when half of their certificates' life is over; devices are told by the next version of the trust bundle, which
 * one that was away hears when it comes. The keys stay: a device that has the older certificates understands every message until those end. Harmless to repeat.
 */
export const renewRoles = async (ctx: Context): Promise<void> => {
  if (dueRoles(ctx).length === 0) return
  await inOrder(ctx, async () => {
    // Once more: a rollover may have certified them meanwhile.
    const due = dueRoles(ctx)
    const { number } = activeOf(await rolloverOf(ctx))
    if (due.length === 0) return
    const intent: Intent = { caller: system, action: 'ca.settle', subject: subjectOf(number) }
    const issued = await prepareCertificates(
      ctx,
      ctx.authority,
      intent,
      due.map((role) => ({ ...roleOrder(ctx, role, parseCertificate(ctx.authority.roles[role].certificate).spki), device: null })),
    )
    await perform(ctx, { ...intent, detail: `message keys certified anew: ${due.join(', ')}` }, async (tx) => {
      for (const [at, one] of issued.entries()) {
        const setting = await ctx.store.get('setting', roleSetting(due[at] ?? 'challenge', number))
        if (setting === undefined) throw new Problem('internal', `there is no certificate of ${String(due[at])}`)
        await certifyAgain(ctx, tx, one, new Set([parseCertificate(setting.value).serial]))
        recordIssued(tx, one)
        tx.update('setting', { ...setting, value: one.der })
      }
      await setRollover(ctx, tx, published(await rolloverOf(ctx), ctx.now()))
    })
    // A crash here: devices hear it with their next report.
    ctx.step('roles.renewed')
    await ctx.authority.reload()
    await announceTrust(ctx)
  })
}
